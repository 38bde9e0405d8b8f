"""The adapters that learn in one pass, each with the learning rate, schedule and clipping that it would have alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.attach.attachments import attachments_of
from lorakit.train.arguments import optimizer_groups, schedule_of
from lorakit.train.recipe import TrainSection

_ADAPTER = "adapter"


@dataclass(frozen=True)
class Learner:
    """An adapter that is trained.

    Attributes:
        name: Its name on the model.
        steps: Optimizer steps that teach it something; they are the first ones of the run.
        lr: Its peak learning rate.
    """

    name: str
    steps: int
    lr: float


def learner_groups(
    settings: TrainSection, model: nn.Module, learners: Sequence[Learner]
) -> list[dict[str, Any]]:
    """The optimizer's groups, see `lorakit.parameter_groups`; of several adapters, each has its own.

    Raises:
        ConfigError: No parameter has a role that should be fast.
    """
    groups = optimizer_groups(settings, model)
    if len(learners) == 1:
        return groups
    found = []
    for learner in learners:
        own = {id(parameter) for parameter in parameters_of(model, learner.name)}
        for group in groups:
            parameters = [parameter for parameter in group["params"] if id(parameter) in own]
            rate = group["lr"] * learner.lr / settings.lr
            if parameters:
                found.append({**group, "params": parameters, "lr": rate, _ADAPTER: learner.name})
    return found


def learner_schedule(
    optimizer: torch.optim.Optimizer, learners: Sequence[Learner], settings: TrainSection
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedules of transformers, one for each adapter over its own steps."""
    rates = {learner.name: schedule_of(settings, learner.steps) for learner in learners}
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, [rates[group[_ADAPTER]] for group in optimizer.param_groups]
    )


def parameters_of(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The trained parameters of an adapter."""
    for _, adapter in attachments_of(model).parameters_of(name):
        yield from (p for p in adapter._parameters.values() if p is not None and p.requires_grad)
