"""What every request passes first: its id, the key, the limits, its body; and what every answer passes last: the log.

This is plain ASGI around the application, so it sees the whole of a stream: a request counts as in flight, and holds
its body, until its last byte has gone out or its client has gone away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.errors import (
    ClientDisconnectedError,
    EngineDeadError,
    InvalidRequestError,
    ShuttingDownError,
)
from lorakit.serve.api.errors import as_serve_error, error_response
from lorakit.serve.api.record import CLIENT_GONE, RequestRecord, request_id

if TYPE_CHECKING:
    from lorakit.serve.api.service import Service

ANSWERING = frozenset({"/v1/chat/completions", "/v1/completions", "/generate", "/generate_stream"})
"""The paths that ask for an answer of the model: these are limited."""

OPEN = frozenset({"/", "/health", "/health/live", "/health/ready", "/openapi.json"})
"""The paths that need no key."""

QUIET = frozenset({"/health", "/health/live", "/health/ready", "/metrics", "/v1/state"})
"""The paths that are asked again and again by whoever watches: they have no line in the log."""


class Gate:
    """The outermost part of the application."""

    def __init__(self, app: ASGIApp, service: Service, open_paths: Collection[str] = ()) -> None:
        self.app, self.service = app, service
        self.open = OPEN | frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = RequestRecord(
            id=request_id(headers.get("x-request-id")),
            method=scope["method"],
            path=scope["path"][:300],
            client=scope["client"][0] if scope.get("client") else None,
        )
        scope.setdefault("state", {})["record"] = record

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                added = MutableHeaders(scope=message)
                added["X-Request-Id"] = record.id
                added["X-Content-Type-Options"] = "nosniff"
                if record.adapter is not None:
                    added["X-Adapter-Version"] = record.adapter
            await send(message)

        try:
            await self._pass(scope, headers, record, receive, stamped)
        except asyncio.CancelledError:  # the program stops, and its time to finish what it began is over
            record.error = record.error or ShuttingDownError.code
            raise
        except Exception as error:
            told = as_serve_error(error, record)
            record.error = told.code
            if isinstance(told, ClientDisconnectedError):
                record.status = CLIENT_GONE
            elif record.status is None:
                await error_response(told, record)(scope, receive, stamped)
            else:  # part of the answer is gone: what is left is to end the connection
                raise
        finally:
            self.service.metrics.count(record)
            if record.path not in QUIET:
                record.write()

    async def _pass(
        self, scope: Scope, headers: Headers, record: RequestRecord, receive: Receive, send: Send
    ) -> None:
        service = self.service
        if scope["path"] not in self.open:
            record.tenant = service.keys.tenant(headers.get("authorization"))
        with ExitStack() as held:
            if scope["path"] in ANSWERING and scope["method"] == "POST":
                if service.draining:
                    raise ShuttingDownError("The server is about to stop and takes on nothing new.")
                if not service.server.engine.alive:
                    raise EngineDeadError("The engine has stopped; it is being started again.")
                held.enter_context(service.admission.request(record.tenant))
            hold = held.enter_context(service.admission.body())
            body = await self._body(headers, receive, hold)
            await self.app(scope, _replay(body, receive), send)

    async def _body(self, headers: Headers, receive: Receive, hold: Callable[[int], None]) -> bytes:
        """The whole body, or an error as soon as it is known to be too large or too slow."""
        announced = headers.get("content-length", "")
        if announced.isdigit():
            self.service.admission.check_length(int(announced))
        seconds = self.service.admission.limits.body_seconds
        try:
            return await asyncio.wait_for(_read(receive, hold), seconds)
        except asyncio.TimeoutError as error:
            raise _SlowBodyError(
                f"The body of the request did not come within {seconds:g} seconds."
            ) from error


async def _read(receive: Receive, hold: Callable[[int], None]) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError("The client went away while it sent its request.")
        hold(len(message.get("body", b"")))
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


class _SlowBodyError(InvalidRequestError):
    """A body that came too slowly."""

    status = 408


def _replay(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the body at once, and then whatever the server tells."""
    told = False

    async def replayed() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
