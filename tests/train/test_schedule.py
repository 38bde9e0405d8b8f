"""The learning rate of a run with a time limit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lorakit.train import Recipe, read_metrics, train
from lorakit.train.arguments import schedule_of
from lorakit.train.recipe import TrainSection
from lorakit.train.schedule import rate_factor, set_rates, timed_schedule

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 7])
def test_without_hurry_it_is_transformers_schedule(schedule: str, warmup: float) -> None:
    settings = TrainSection(schedule=schedule, warmup=warmup, max_seconds=1e9)  # type: ignore[arg-type]
    plain = schedule_of(settings, 50)
    for step in range(51):
        assert rate_factor(settings, step, 50, step / 50) == pytest.approx(plain(step), abs=1e-12)


@pytest.mark.parametrize(("schedule", "half"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_it_falls_by_time_where_time_is_short(schedule: str, half: float) -> None:
    settings = TrainSection(schedule=schedule, warmup=0, max_seconds=100)  # type: ignore[arg-type]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    now = [0.0]
    scheduler = timed_schedule(optimizer, settings, 10_000, lambda: now[0])
    rates = []
    for now[0] in (50.0, 100.0, 130.0):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0] / 2.0)
    end = 1.0 if schedule == "constant" else 0.0
    assert rates == pytest.approx([half, end, end], abs=1e-3)


def test_the_warm_up_is_over_after_its_share_of_the_time() -> None:
    settings = TrainSection(warmup=0.1, max_seconds=100)
    assert rate_factor(settings, 2, 1000, 0.05) == pytest.approx(0.5)
    assert rate_factor(settings, 3, 1000, 0.1) == pytest.approx(1.0)
    assert rate_factor(settings, 30, 1000, 0.55) == pytest.approx(0.5)
    in_steps = TrainSection(warmup=10, max_seconds=100)
    assert rate_factor(in_steps, 5, 1000, 0.9) == pytest.approx(0.5)


def test_set_rates_takes_those_of_the_schedule() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 2.0}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    optimizer.param_groups[0]["lr"] = 99.0
    set_rates(optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert scheduler.get_last_lr() == [1.0]


def test_a_run_in_a_hurry_ends_with_a_small_rate(recipe: MakeRecipe) -> None:
    result = train(recipe(max_steps=100_000, max_seconds=1.5, log_every=1, warmup=0))
    rates = [line["learning_rate"] for line in read_metrics(result.folder / "metrics.jsonl")]
    assert result.stopped_by == "max_seconds"
    assert rates[0] == pytest.approx(1e-2)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.3 * rates[0]
