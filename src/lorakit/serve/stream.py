"""The answer as it comes: events from the engine's thread to a reader in a thread or an asyncio task."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from lorakit.serve.requests import Event, FinishEvent, TokenEvent


class Stream:
    """The events of one request, for one reader: ``for event in stream`` or ``async for event in stream``.

    Ends after the last `FinishEvent`. Leaving early, or `cancel`, tells the engine to stop.

    Attributes:
        id: The request's.
    """

    def __init__(
        self,
        request_id: str,
        answers: int = 1,
        *,
        most_events: int = 4096,
        on_cancel: Callable[[], None] | None = None,
    ) -> None:
        """Make one; the engine does.

        Args:
            request_id: The request's id.
            answers: How many `FinishEvent` to wait for.
            most_events: Unread events that the reader may be behind.
            on_cancel: Called when the reader gives up.
        """
        self.id = request_id
        self._left, self._most, self._on_cancel = answers, most_events, on_cancel
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    # ---- the engine's side
    def put(self, event: Event) -> bool:
        """Hand over an event. False when the reader is too far behind (the event is lost then, an end is not)."""
        with self._changed:
            if len(self._events) >= self._most and not isinstance(event, FinishEvent):
                return False
            self._events.append(event)
            self._changed.notify()
            waiter, self._waiter = self._waiter, None
        if waiter is not None:
            loop, future = waiter
            try:
                loop.call_soon_threadsafe(_wake, future)
            except RuntimeError:  # the reader's loop was closed: nobody reads any more
                self.cancel()
        return True

    # ---- the reader's side
    def cancel(self) -> None:
        """Stop the request; what is there can still be read."""
        if self._left and self._on_cancel is not None:
            self._on_cancel()

    @property
    def finished(self) -> bool:
        """Whether the last event has been read."""
        return self._left == 0

    def get(self, timeout: float | None = None) -> Event | None:
        """The next event; None after the last one.

        Raises:
            TimeoutError: None came in time.
        """
        if not self._left:
            return None
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._events), timeout):
                raise TimeoutError(f"Request {self.id} gave nothing for {timeout:g} seconds.")
            return self._take()

    def __iter__(self) -> Iterator[Event]:
        """Events as they come; blocks."""
        try:
            while (event := self.get()) is not None:
                yield event
        finally:
            self.cancel()

    async def aget(self) -> Event | None:
        """The next event, without blocking the event loop; None after the last one."""
        while self._left:
            loop = asyncio.get_running_loop()
            with self._changed:
                if self._events:
                    return self._take()
                future: asyncio.Future[None] = loop.create_future()
                self._waiter = (loop, future)
            await future
        return None

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events as they come."""
        try:
            while (event := await self.aget()) is not None:
                yield event
        finally:
            self.cancel()

    def texts(self) -> list[str]:
        """Read to the end: the text of each answer.

        Raises:
            Exception: What an answer failed with.
        """
        parts: dict[int, list[str]] = {}
        error: Exception | None = None
        for event in self:
            if isinstance(event, TokenEvent):
                parts.setdefault(event.index, []).append(event.text)
            elif isinstance(event, FinishEvent):
                parts.setdefault(event.index, [])
                error = error or event.error
        if error is not None:
            raise error
        return ["".join(parts[index]) for index in sorted(parts)]

    def _take(self) -> Event:
        event = self._events.popleft()
        if isinstance(event, FinishEvent):
            self._left -= 1
        return event


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
