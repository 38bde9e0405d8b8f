"""What every request passes first: its id, the key, the limits, its body; and what every answer passes last: the log.

This is plain ASGI around the application, so it sees the whole of a stream: a request counts as in flight, and holds
its body, until its last byte has gone out or its client has gone away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import ExitStack
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lorakit.errors import ServeError, ShuttingDownError
from lorakit.serve.api.exchange import answer_failure, read_body, record_of, replayed, stamped
from lorakit.serve.api.record import RequestRecord

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
        record = record_of(scope, headers)
        scope.setdefault("state", {})["record"] = record
        send = stamped(send, record)
        try:
            await self._pass(scope, headers, record, receive, send)
        except asyncio.CancelledError:  # the program stops, and its time to finish what it began is over
            record.error = record.error or ShuttingDownError.code
            raise
        except Exception as error:
            await answer_failure(_itself(error), record, scope, receive, send)
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
                service.check_open()
                held.enter_context(service.admission.request(record.tenant))
            hold = held.enter_context(service.admission.body())
            body = await read_body(headers, receive, service.admission, hold)
            await self.app(scope, replayed(body, receive), send)


def _itself(error: Exception) -> Exception:
    """What was raised: starlette wraps an error that it could have answered if the answer had not begun."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, ServeError) else error
