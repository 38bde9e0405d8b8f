"""Events cross from the engine's thread to a reader in a thread or an asyncio task, in order, and never block it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from lorakit.errors import InternalServeError
from lorakit.serve.requests import FinishEvent, TokenEvent, Usage
from lorakit.serve.stream import Stream

END = FinishEvent(0, "stop", Usage(1, 2))


def token(i: int, index: int = 0) -> TokenEvent:
    return TokenEvent(index, i, f"{i} ")


def test_a_thread_reads_in_order_until_the_end() -> None:
    stream = Stream("r")
    writer = threading.Thread(target=lambda: [stream.put(e) for e in (*map(token, range(100)), END)])
    writer.start()
    assert list(stream) == [*map(token, range(100)), END]
    assert stream.finished
    assert stream.get() is None
    writer.join()


def test_a_task_reads_what_a_thread_writes() -> None:
    stream, asked = Stream("r"), threading.Event()

    def write() -> None:
        asked.wait(5)
        for event in (*map(token, range(50)), END):
            stream.put(event)

    async def main() -> list[object]:
        writer = threading.Thread(target=write)
        writer.start()
        asyncio.get_running_loop().call_later(0.01, asked.set)
        found = [event async for event in stream]
        writer.join()
        return found

    assert asyncio.run(main()) == [*map(token, range(50)), END]


def test_every_answer_has_its_end() -> None:
    stream = Stream("r", 2)
    for event in (token(1, 0), END, token(2, 1), FinishEvent(1, "length", Usage(1, 1))):
        stream.put(event)
    assert stream.texts() == ["1 ", "2 "]


def test_leaving_early_cancels_and_reading_to_the_end_does_not() -> None:
    cancelled: list[int] = []
    stream = Stream("r", on_cancel=lambda: cancelled.append(1))
    stream.put(token(1))
    stream.put(token(2))
    for _ in stream:
        break
    assert cancelled == [1]
    other = Stream("s", on_cancel=lambda: cancelled.append(2))
    other.put(END)
    assert list(other) == [END]
    other.cancel()
    assert cancelled == [1]


def test_a_task_that_is_cancelled_cancels_the_request() -> None:
    cancelled = threading.Event()

    async def main() -> None:
        stream = Stream("r", on_cancel=cancelled.set)

        async def reader() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(reader())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream.put(token(1))  # nobody waits any more: it is kept, and nothing breaks

    asyncio.run(main())
    assert cancelled.is_set()


def test_a_slow_reader_is_told_from_a_quick_one_and_still_gets_the_end() -> None:
    stream = Stream("r", most_events=3)
    assert [stream.put(token(i)) for i in range(4)] == [True, True, True, False]
    assert stream.put(END)
    assert list(stream) == [token(0), token(1), token(2), END]


def test_waiting_in_vain_ends_in_time() -> None:
    with pytest.raises(TimeoutError, match="Request r"):
        Stream("r").get(0.01)


def test_a_closed_loop_is_a_reader_who_left() -> None:
    cancelled: list[int] = []
    stream = Stream("r", on_cancel=lambda: cancelled.append(1))
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(stream.aget())
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    stream.put(token(1))
    assert cancelled == [1]
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]


def test_texts_raise_what_an_answer_failed_with() -> None:
    stream = Stream("r")
    stream.put(FinishEvent(0, "error", Usage(1, 0), InternalServeError("it broke")))
    with pytest.raises(InternalServeError, match="it broke"):
        stream.texts()
