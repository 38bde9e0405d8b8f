"""The engines' requests come when they should, and what cannot be run is told."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import serve_arrivals, serve_throughput
from benchmarks.harness import LORAKIT, Benchmark
from benchmarks.serving import engines, load, sides
from benchmarks.serving.load import Asked, Coming, facts, make_load


class Clock:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(load, "time", made)
    return made


def asked(*arrivals: float) -> list[Asked]:
    return [Asked([1], 1, None, at) for at in arrivals]


def test_requests_that_come_by_themselves_have_waited_since_they_came(clock: Clock) -> None:
    first, second, third = all_ = asked(0.5, 1.0, 4.0)
    coming = Coming(all_, None)
    assert coming.due(0) == []
    coming.wait()
    assert clock.now == 100.5
    assert coming.due(0) == [first]
    clock.now = 103.0  # the engine was at work
    assert coming.due(16) == [second]
    assert (first.submitted, second.submitted) == (100.5, 101.0)
    assert coming
    coming.wait()
    assert coming.due(0) == [third]
    assert not coming


def test_so_many_at_a_time(clock: Clock) -> None:
    first, second, third = all_ = asked(9, 9, 9)
    coming = Coming(all_, 2)
    assert coming.due(0) == [first, second]
    assert coming.due(2) == []
    clock.now = 107.0
    assert coming.due(1) == [third]
    assert third.submitted == 107.0


def test_arrivals_have_the_rate_and_the_bursts_that_were_asked_for() -> None:
    for cv in (0.5, 1.0, 3.0):
        at = [0.0, *(one.arrival for one in make_load(5, "power", 6000, rate=4.0, cv=cv))]
        steps = [b - a for a, b in pairwise(at)]
        assert statistics.mean(steps) == pytest.approx(1 / 4, rel=0.15)
        assert statistics.stdev(steps) / statistics.mean(steps) == pytest.approx(cv, rel=0.15)


def test_copies_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=1000
    ).save_pretrained(tmp_path)
    assert engines.why_copies_do_not_fit(tmp_path, 1) is None
    reason = sides.why_left_out(sides.COPIES, tmp_path, 10_000_000)
    assert reason is not None
    assert reason.startswith("10000000 copies of 1 MB take")
    assert sides.why_left_out(sides.MIXED, tmp_path, 10_000_000) is None


def test_an_engine_of_another_project_is_run_where_its_interpreter_is_named() -> None:
    assert sides.VLLM not in sides.chosen(None, None, None)
    assert sides.chosen([LORAKIT, sides.VLLM], None, "python") == {LORAKIT: None, sides.VLLM: "python"}


def row(**others: float) -> dict[str, object]:
    return {
        "requests": 3, "unanswered": 0, "tokens": 60, "adapters_used": 2, "tokens_per_second": 5.0,
        "first_token_p50": 0.5, "first_token_p99": 7.0, "within_six_seconds": 0.9, **others,
    }  # fmt: skip


def test_what_was_left_out_is_in_the_note() -> None:
    bench = Benchmark("serve_throughput", "?", False, 1, None)
    found = {(LORAKIT, "uniform"): {100: [row()]}}
    serve_throughput.report(bench, "smollm2", found, {100: {sides.COPIES: "no room"}})
    told = bench.measurements[0].to_json()
    assert told["note"].endswith(f"Without {sides.COPIES}: no room.")


def test_arrivals_are_told_for_each_engine() -> None:
    bench = Benchmark("serve_arrivals", "?", False, 1, None)
    rows = {LORAKIT: [row()], sides.VLLM: [row(within_six_seconds=0.1, unanswered=1)]}
    serve_arrivals.report(bench, "20 adapters, 2 requests a second", rows, "About.")
    by_name = {m.name.rpartition(": ")[2]: m.to_json() for m in bench.measurements}
    assert list(by_name) == ["done", "first token, median", "first token, 99th percentile", "in time"]
    assert by_name["in time"]["sides"][sides.VLLM]["median"] == 0.1
    assert "3 requests for 2 adapters" in by_name["done"]["note"]
    assert f"{sides.VLLM} left 1 unanswered." in by_name["done"]["note"]
    assert f"{LORAKIT} left" not in by_name["done"]["note"]


def test_a_request_without_an_answer_is_an_error_or_late() -> None:
    asked = make_load(2, requests=4, seed=1)
    for one in asked[1:]:
        one.submitted, one.first, one.done = 0.0, 1.0, 3.0
    with pytest.raises(RuntimeError, match="1 of 4 requests were not answered"):
        facts(asked, 0.0)
    told = facts(asked, 0.0, all_answered=False)
    assert (told["unanswered"], told["within_six_seconds"]) == (1, 0.75)
    assert told["tokens"] == sum(one.tokens for one in asked[1:])
    with pytest.raises(RuntimeError, match="4 of 4"):
        facts(make_load(2, requests=4, seed=1), 0.0, all_answered=False)
