"""The harness: turns are taken, spread and ratios are taken round by round, quick runs say so."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path

import pytest

from benchmarks.harness import (
    BASE,
    LORAKIT,
    PEFT,
    Aim,
    Benchmark,
    Measurement,
    Side,
    digits,
    number,
    over_base,
    quotients,
    summary,
)


def bench(*, quick: bool = False, json: Path | None = None) -> Benchmark:
    return Benchmark("name", "What?", quick, 1, json)


def test_the_sides_take_turns_with_their_own_preparation() -> None:
    calls: list[str] = []
    sides = {
        name: Side(
            *(
                lambda name=name, what=what: calls.append(f"{what} {name}")
                for what in ("run", "before", "after")
            )
        )  # type: ignore[misc]
        for name in (LORAKIT, PEFT)
    }
    samples = bench().measure(sides, rounds=4, warmup=1)
    one = [f"{what} {name}" for name in (LORAKIT, PEFT) for what in ("before", "run", "after")]
    assert calls == one * 5
    assert [len(s) for s in samples.values()] == [4, 4]


def test_a_fast_side_is_repeated_and_told_per_run() -> None:
    count = 0

    def run() -> None:
        nonlocal count
        count += 1
        time.sleep(0.0005)

    samples = bench().measure({LORAKIT: run}, rounds=2, warmup=0, at_least=0.01)
    assert count > 20
    assert all(0.0004 < seconds < 0.01 for seconds in samples[LORAKIT])


def test_the_collector_rests_only_while_the_clock_runs() -> None:
    seen: list[bool] = []
    bench().measure({LORAKIT: Side(lambda: seen.append(gc.isenabled()), before=lambda: None)}, rounds=2)
    assert seen == [False] * 4
    assert gc.isenabled()


def test_ratios_are_taken_round_by_round() -> None:
    # The machine was ten times slower in the second round: the ratio does not care, a ratio of means would.
    samples = {LORAKIT: [1.0, 10.0, 1.0], PEFT: [3.0, 30.0, 3.0]}
    told = Measurement("x", "s", samples, aim=Aim("ratio", ">=", 3)).to_json()
    assert told["ratio"]["of"] == "peft / lorakit"
    assert {told["ratio"][k] for k in ("median", "min", "max")} == {3.0}
    assert told["aim"]["met"]
    assert told["sides"][LORAKIT] == {"median": 1.0, "min": 1.0, "max": 10.0, "q1": 1.0, "q3": 5.5, "n": 3}
    assert not Measurement("x", "s", samples, aim=Aim(LORAKIT, "<=", 0.9)).to_json()["aim"]["met"]


def test_what_is_added_is_measured_from_the_base_of_the_same_round() -> None:
    added = over_base({BASE: [1.0, 5.0], LORAKIT: [2.0, 6.0], PEFT: [4.0, 9.0]})
    assert added == {LORAKIT: [1.0, 1.0], PEFT: [3.0, 4.0]}
    assert quotients(added[LORAKIT], added[PEFT]) == [1 / 3, 0.25]


def test_a_summary_of_one_sample() -> None:
    assert summary([2.0]) == {"median": 2.0, "min": 2.0, "max": 2.0, "q1": 2.0, "q3": 2.0, "n": 1}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.5, "s", "1.5 s"),
        (0.0123456, "s", "12.3 ms"),
        (-4.5e-6, "s", "-4.5 µs"),
        (2e-9, "s", "2 ns"),
        (1630, "x", "1,630 x"),
    ],
)
def test_figures_are_told_with_three_digits(value: float, unit: str, text: str) -> None:
    assert number(value, unit) == text
    assert digits(12345) == "12,300"
    assert digits(0.01234) == "0.0123"


def test_the_result_says_where_and_how(tmp_path: Path) -> None:
    one = bench(quick=True, json=tmp_path / "deep" / "out.json")
    assert one.rounds(50) == 3
    one.add("line", {LORAKIT: [1.0], PEFT: [2.0]}, note="Note.")
    one.finish()
    told = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert told["quick"] is True
    assert told["machine"]["cores"] >= 1
    assert told["machine"]["threads"] == 1
    assert told["versions"]["torch"]
    assert told["versions"]["lorakit"]
    assert told["measurements"][0]["ratio"]["median"] == 2.0
