"""Server-sent events, and noticing that nobody listens any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lorakit.errors import ClientDisconnectedError
from lorakit.serve.api.errors import as_serve_error, error_text
from lorakit.serve.api.record import RequestRecord
from lorakit.serve.requests import Event

T = TypeVar("T")

Followed = AsyncGenerator[tuple[int, Event], None]
"""What `Service.follow` gives."""

DONE = "data: [DONE]\n\n"


def event(text: str) -> str:
    """One event of a stream; the text is one line of JSON."""
    return f"data: {text}\n\n"


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of some work, which is given up when the client goes away.

    Args:
        receive: Tells when it has; the body has been received before.
        work: What to do.

    Raises:
        ClientDisconnectedError: It did.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError("The client went away before its answer was complete.")
        return await task
    finally:
        await _end(task)
        await _end(gone)


class EventStream(Response):
    """A response of server-sent events, which closes its source when it is over or its client goes away."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[str, None], headers: Mapping[str, str] | None = None) -> None:
        """Make one.

        Args:
            source: The events; it handles its own errors.
            headers: Further headers.
        """
        # X-Accel-Buffering: nginx would hold the events back.
        fixed = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(None, headers={**fixed, **(headers or {})})
        del self.headers["content-length"]
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write, gone = asyncio.ensure_future(self._write(send)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({write, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not write.done():
                raise ClientDisconnectedError("The client went away in the middle of its stream.")
            await write
        finally:
            await _end(write)
            await _end(gone)
            await self.source.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for text in self.source:
            await send({"type": "http.response.body", "body": text.encode("utf-8"), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def event_stream(
    record: RequestRecord,
    followed: Followed,
    say: Callable[[int, Event], Iterable[str]],
    *,
    opening: Iterable[str] = (),
    closing: Callable[[], Iterable[str]] = tuple,
) -> EventStream:
    """A response that tells the engine's events as they come.

    It begins with the first of them, so until then a failure still has a status of its own. A later one is told as an
    event with the error's body, after which the stream ends without what ``closing`` says.

    Args:
        record: The request's.
        followed: The engine's events.
        say: What to send for one of them.
        opening: What is sent before.
        closing: What is sent after the last one.
    """
    first = await anext(followed)

    async def told() -> AsyncGenerator[str, None]:
        try:
            for text in opening:
                yield text
            for text in say(*first):
                yield text
            async for what in followed:
                for text in say(*what):
                    yield text
            for text in closing():
                yield text
        except Exception as error:
            failure = as_serve_error(error, record)
            record.error = failure.code
            yield event(error_text(failure))
        finally:
            await followed.aclose()

    return EventStream(told())


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone away; the body has been received before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: asyncio.Future[T]) -> None:
    """Stop a task and wait until it has; what it raised has been seen or does not matter."""
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
