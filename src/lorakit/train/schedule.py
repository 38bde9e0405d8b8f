"""The learning rate over a run that has a time limit: it falls by whichever is nearer to its end, steps or time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lorakit.train.recipe import TrainSection


def timed_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainSection, steps: int, seconds: Callable[[], float]
) -> LambdaLR:
    """The schedule of a recipe with ``max_seconds``.

    Args:
        optimizer: Whose rates it sets.
        settings: The recipe's.
        steps: Steps of the whole run, if it were not stopped.
        seconds: Tells how long the run has trained.
    """
    limit = settings.max_seconds
    assert limit is not None

    def factor(step: int) -> float:
        return rate_factor(settings, step, steps, max(step / steps, seconds() / limit))

    return LambdaLR(optimizer, factor)


def rate_factor(settings: TrainSection, step: int, steps: int, progress: float) -> float:
    """What the peak rate is multiplied by, between 0 and 1.

    Args:
        settings: ``schedule`` and ``warmup``; a warm-up that is given as a share of the run is over after that share
            of its steps or of its time, whichever comes first.
        step: Steps done.
        steps: Steps of the whole run.
        progress: How much of the run is over, from 0 to 1 (and beyond, in the step in which the time runs out).
    """
    warm_steps = round(settings.warmup * steps if settings.warmup < 1 else settings.warmup)
    if warm_steps:
        by_time = progress / settings.warmup if settings.warmup < 1 else 0.0
        risen = max(step / warm_steps, by_time)
        if risen < 1:
            return risen
    warm = warm_steps / steps
    if settings.schedule == "constant":
        return 1.0
    rest = min(1.0, max(0.0, (progress - warm) / (1 - warm))) if warm < 1 else 1.0
    return 1 - rest if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * rest))


def set_rates(optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
    """Give the optimizer the rates of its schedule, where a checkpoint brought those of the schedule that it had then.

    For an unchanged schedule these are the same numbers.
    """
    inner: Any = scheduler
    if not isinstance(inner, LambdaLR):
        return
    rates = [
        base * factor(inner.last_epoch) for base, factor in zip(inner.base_lrs, inner.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    inner._last_lr = rates
