"""One request and its answer as ASGI messages: what the gate of a server and a router do alike with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from lorakit.errors import ClientDisconnectedError, InvalidRequestError
from lorakit.serve.api.errors import as_serve_error, error_response
from lorakit.serve.api.limits import Admission
from lorakit.serve.api.record import CLIENT_GONE, RequestRecord, request_id


def record_of(scope: Scope, headers: Headers) -> RequestRecord:
    """What is known of a request when it comes."""
    return RequestRecord(
        id=request_id(headers.get("x-request-id")),
        method=scope["method"],
        path=scope["path"][:300],
        client=scope["client"][0] if scope.get("client") else None,
    )


def stamped(send: Send, record: RequestRecord) -> Send:
    """Sends an answer with the headers that every answer has, and notes its status."""

    async def stamp(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            added = MutableHeaders(scope=message)
            added["X-Request-Id"] = record.id
            added["X-Content-Type-Options"] = "nosniff"
            if record.adapter is not None:
                added["X-Adapter-Version"] = record.adapter
        await send(message)

    return stamp


async def read_body(
    headers: Headers, receive: Receive, admission: Admission, hold: Callable[[int], None]
) -> bytes:
    """The whole body, or an error as soon as it is known to be too large or too slow.

    Args:
        headers: The request's; an announced length is believed when it is too large.
        receive: Gives the body.
        admission: Whose limits count.
        hold: Called with the bytes of each piece, see `Admission.body`.

    Raises:
        RequestTooLargeError: It is too large.
        OverloadedError: There are too many bytes in all.
        InvalidRequestError: It did not come in time; the status is 408.
        ClientDisconnectedError: The client went away.
    """
    announced = headers.get("content-length", "")
    if announced.isdigit():
        admission.check_length(int(announced))
    seconds = admission.limits.body_seconds
    try:
        return await asyncio.wait_for(_read(receive, hold), seconds)
    except asyncio.TimeoutError as error:
        raise InvalidRequestError(
            f"The body of the request did not come within {seconds:g} seconds.", status=408
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


def replayed(body: bytes, receive: Receive) -> Receive:
    """What an application receives: the body at once, and then whatever ``receive`` tells."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def answer_failure(
    error: Exception, record: RequestRecord, scope: Scope, receive: Receive, send: Send
) -> None:
    """Tell the client what went wrong, if nothing of an answer has gone out.

    Args:
        error: What was raised.
        record: The request's; gets the error's code.
        scope: The request's.
        receive: The request's.
        send: To the client, see `stamped`.

    Raises:
        Exception: The error itself, when part of the answer is gone: what is left is to end the connection.
    """
    told = as_serve_error(error, record)
    record.error = told.code
    if isinstance(told, ClientDisconnectedError):
        record.status = CLIENT_GONE
    elif record.status is None:
        await error_response(told, record)(scope, receive, send)
    else:
        raise error
