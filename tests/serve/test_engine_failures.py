"""Whatever goes wrong: whoever is to blame gets an error, nobody else notices, nothing leaks."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from lorakit.errors import (
    DeadlineExceededError,
    EngineDeadError,
    InternalServeError,
    MemoryExhaustedError,
    RequestAbortedError,
    ShuttingDownError,
    SlowReaderError,
)
from lorakit.serve.answer import Answer
from lorakit.serve.engine import Engine
from lorakit.serve.requests import FinishEvent, TokenEvent
from lorakit.serve.runner import StepBatch
from lorakit.serve.scheduler import EngineLimits, Scheduler
from tests.serve.tiny_serving import (
    PROMPT,
    CountedLease,
    alone,
    byte_tokenizer,
    ids,
    read,
    request,
)
from tests.serve.watched_runner import STOCK, VERSIONS, Watched, steps_until


# ---- ends before their time
def test_an_aborted_request_ends_at_the_next_step_and_gives_all_back(engine: Engine) -> None:
    asked = request(PROMPT, VERSIONS["lora-2"], max_tokens=240)
    stream = engine.submit(asked)
    assert isinstance(stream.get(30), TokenEvent)
    engine.abort(asked.id)
    _, finish = read(stream)
    assert (finish.reason, finish.error) == ("abort", None)
    assert asked.lease is not None
    assert asked.lease.returned == 1  # type: ignore[attr-defined]
    assert engine.state().kv_tokens == 0
    engine.abort(asked.id)
    engine.abort("nobody")


def test_a_reader_who_leaves_ends_the_request(engine: Engine) -> None:
    for _ in engine.submit(request(PROMPT, max_tokens=240)):
        break
    steps_until(lambda: engine.state().running == 0)
    assert engine.state().generated_tokens < 200


def test_a_waiting_request_can_be_aborted(engine: Engine, runner: Watched) -> None:
    runner.gate.clear()
    first = engine.submit(request(PROMPT, max_tokens=2))
    steps_until(lambda: engine.state().waiting == 0)
    asked = request(PROMPT, VERSIONS["dora"], n=2)
    waiting = engine.submit(asked)
    waiting.cancel()
    runner.gate.set()
    ends = [event for event in waiting if isinstance(event, FinishEvent)]
    assert [(end.index, end.reason, end.usage.completion_tokens) for end in ends] == [
        (0, "abort", 0),
        (1, "abort", 0),
    ]
    assert asked.lease.returned == 1  # type: ignore[union-attr]
    assert read(first)[1].reason == "length"


def test_unloading_by_force_ends_the_requests_of_that_adapter_alone(engine: Engine, runner: Watched) -> None:
    runner.gate.clear()
    mine = [engine.submit(request(PROMPT, VERSIONS["lora-2"], max_tokens=30)) for _ in range(2)]
    other = engine.submit(request(PROMPT, VERSIONS["lora-7"], max_tokens=30))
    assert engine.abort_adapter(VERSIONS["lora-2"].digest) == 2
    runner.gate.set()
    assert all(isinstance(read(stream)[1].error, RequestAbortedError) for stream in mine)
    assert ids(read(other)[0]) == alone(STOCK, VERSIONS["lora-7"], PROMPT, 30)


def test_a_deadline_is_for_the_queue(engine: Engine, runner: Watched) -> None:
    runner.gate.clear()
    running = engine.submit(request(PROMPT, max_tokens=5, deadline=time.monotonic() + 0.05))
    steps_until(lambda: engine.state().waiting == 0)
    late = engine.submit(request(PROMPT, max_tokens=5, deadline=time.monotonic() + 0.05))
    time.sleep(0.1)
    runner.gate.set()
    tokens, finish = read(late)
    assert not tokens
    assert isinstance(finish.error, DeadlineExceededError)
    assert read(running)[1].reason == "length"


def test_a_slow_reader_loses_the_request_and_holds_nobody_up(engine: Engine) -> None:
    slow = engine.submit(request(PROMPT, max_tokens=200))
    quick, _ = read(engine.submit(request(PROMPT, max_tokens=100, id="quick")), 60)[0], None
    assert len(quick) == 100
    steps_until(lambda: engine.state().running == 0)
    tokens, finish = read(slow)
    assert len(tokens) == 64
    assert isinstance(finish.error, SlowReaderError)


# ---- failures inside
def has(batch: StepBatch, token: int) -> bool:
    return token in batch.tokens.tolist()


def test_a_step_that_fails_is_bisected_and_fails_for_one(engine: Engine, runner: Watched) -> None:
    def spoil(batch: StepBatch) -> None:
        if has(batch, 300):
            raise RuntimeError("secret detail of the machine")

    runner.spoil = spoil
    runner.gate.clear()
    good = [engine.submit(request([*PROMPT, i], max_tokens=6)) for i in range(3)]
    bad = engine.submit(request([1, 300], VERSIONS["dora"], max_tokens=6))
    runner.gate.set()
    _, finish = read(bad)
    assert finish.reason == "error"
    assert isinstance(finish.error, InternalServeError)
    assert "secret" not in str(finish.error)
    assert [ids(read(stream)[0]) for stream in good] == [
        alone(STOCK, None, [*PROMPT, i], 6) for i in range(3)
    ]


def test_too_little_memory_for_a_large_step_is_enough_for_small_ones(engine: Engine, runner: Watched) -> None:
    def spoil(batch: StepBatch) -> None:
        if len(batch.pieces) > 1:
            raise MemoryError

    runner.spoil = spoil
    streams = [engine.submit(request([*PROMPT, i], max_tokens=6)) for i in range(4)]
    assert [ids(read(stream)[0]) for stream in streams] == [
        alone(STOCK, None, [*PROMPT, i], 6) for i in range(4)
    ]
    runner.spoil = lambda batch: (_ for _ in ()).throw(
        RuntimeError("DefaultCPUAllocator: can't allocate memory")
    )
    _, finish = read(engine.submit(request(PROMPT)))
    assert isinstance(finish.error, MemoryExhaustedError)


def test_logits_that_are_no_numbers_end_one_request(engine: Engine, runner: Watched) -> None:
    inner = runner.inner.step

    def step(batch: StepBatch) -> torch.Tensor:
        logits = inner(batch)
        for i, row in enumerate(batch.last.tolist()):
            if batch.tokens[row] == 301:
                logits[i] = float("nan")
        return logits

    runner.inner.step = step  # type: ignore[method-assign]
    bad, good = engine.submit(request([2, 301], max_tokens=5)), engine.submit(request(PROMPT, max_tokens=5))
    assert isinstance(read(bad)[1].error, InternalServeError)
    assert ids(read(good)[0]) == alone(STOCK, None, PROMPT, 5)


def test_a_failing_tokenizer_ends_one_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Answer.take

    def failing(self: Answer, choice: Any, now: float) -> bool:
        if self.job.request.tenant == "unlucky":
            raise ValueError("cannot decode")
        return take(self, choice, now)

    monkeypatch.setattr(Answer, "take", failing)
    bad, good = engine.submit(request(PROMPT, tenant="unlucky")), engine.submit(request(PROMPT, max_tokens=5))
    assert isinstance(read(bad)[1].error, InternalServeError)
    assert read(good)[1].reason == "length"


def test_a_lease_that_cannot_be_given_back_stops_nobody(engine: Engine) -> None:
    asked = request(PROMPT, VERSIONS["lora-2"], max_tokens=2)
    asked.lease._give_back = lambda lease: 1 / 0  # type: ignore[union-attr]
    assert read(engine.submit(asked))[1].reason == "length"
    assert read(engine.submit(request(PROMPT, max_tokens=2)))[1].reason == "length"


def test_a_failure_between_steps_ends_what_runs_and_the_engine_goes_on(
    engine: Engine, runner: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.gate.clear()
    stream = engine.submit(request(PROMPT, VERSIONS["dora"], max_tokens=9))
    steps_until(lambda: engine.state().waiting == 0)
    plan, left = Scheduler.plan, [1]

    def failing(self: Scheduler) -> Any:
        if left:
            left.pop()
            raise KeyError("a bug")
        return plan(self)

    monkeypatch.setattr(Scheduler, "plan", failing)
    runner.gate.set()
    assert isinstance(read(stream)[1].error, InternalServeError)
    assert engine.alive
    assert engine.state().restarts == 1
    assert ids(read(engine.submit(request(PROMPT, max_tokens=5)))[0]) == alone(STOCK, None, PROMPT, 5)


def test_an_engine_that_fails_again_and_again_is_dead_and_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Scheduler) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr(Scheduler, "plan", failing)
    steps_until(lambda: not engine.alive)
    with pytest.raises(EngineDeadError):
        engine.submit(request(PROMPT))
    assert engine.drain(1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_requests_of_an_engine_that_dies_are_all_told(
    runner: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(runner, byte_tokenizer(), limits=EngineLimits(running=2, step_tokens=8)).start()
    runner.gate.clear()
    streams = [engine.submit(request(PROMPT, VERSIONS["lora-2"], max_tokens=9)) for _ in range(5)]

    def dying(self: Scheduler) -> Any:
        raise SystemExit

    monkeypatch.setattr(Scheduler, "plan", dying)
    runner.gate.set()
    assert all(isinstance(read(stream)[1].error, EngineDeadError) for stream in streams)
    steps_until(lambda: not engine.alive)
    assert runner.arena.used == 0


def refused(engine: Engine, error: type[Exception], match: str, **settings: Any) -> None:
    asked = request(settings.pop("prompt", PROMPT), VERSIONS["lora-2"], **settings)
    with pytest.raises(error, match=match):
        engine.submit(asked)
    assert isinstance(asked.lease, CountedLease)
    assert asked.lease.returned == 1


# ---- its end
def test_draining_finishes_what_there_is_and_takes_nothing_new(engine: Engine, runner: Watched) -> None:
    runner.gate.clear()
    stream = engine.submit(request(PROMPT, max_tokens=5))
    assert not engine.drain(0.05)
    refused(engine, ShuttingDownError, "no new requests")
    runner.gate.set()
    assert engine.drain(30)
    assert read(stream)[1].reason == "length"


def test_stopping_ends_everything(runner: Watched) -> None:
    engine = Engine(runner, byte_tokenizer(), limits=EngineLimits(running=1, step_tokens=8)).start()
    assert engine.alive
    streams = [engine.submit(request(PROMPT, VERSIONS["lora-2"], max_tokens=200)) for _ in range(3)]
    streams[0].get(30)
    engine.stop()
    assert not engine.alive
    assert all(isinstance(read(stream)[1].error, ShuttingDownError) for stream in streams)
    assert runner.arena.used == 0


def test_an_engine_that_was_not_started_says_so(runner: Watched) -> None:
    with pytest.raises(EngineDeadError):
        Engine(runner, byte_tokenizer()).submit(request(PROMPT))
