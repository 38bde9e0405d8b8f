"""Watching the gradients of the first steps: a target that never gets one does not learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.attach.attachments import attachments_of
from lorakit.errors import listing

STEPS = 10
"""How many steps are watched: LoRA's ``A`` has no gradient in the first one, and experts are not called in each."""


class GradientWatch(TrainerCallback):
    """Finds the targets whose parameters had a gradient of zero, or none, in each of the first steps."""

    def __init__(self, model: nn.Module, adapters: Iterable[str], told: Callable[[str], None]) -> None:
        """Make the callback.

        Args:
            model: With the adapters on it.
            adapters: The names of those that are trained.
            told: Called with a message when there are such targets.
        """
        self.told = told
        self.silent: tuple[str, ...] = ()
        self._waiting = dict(_trained(model, adapters))
        self._watched = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Gradients are complete."""
        if self._watched >= STEPS or not self._waiting:
            return
        self._waiting = {path: found for path, found in self._waiting.items() if not _has_gradient(found)}
        self._watched += 1
        if self._watched == STEPS or state.global_step + 1 == state.max_steps:
            self._tell()

    def _tell(self) -> None:
        self._watched = STEPS
        self.silent = tuple(self._waiting)
        if self.silent:
            self.told(
                f"{len(self.silent)} targets had no gradient in the first steps, so they learn nothing: "
                f"{listing(self.silent, most=6)}. Nothing that they compute reaches the loss. If that is no surprise, "
                "leave them out with adapter.exclude."
            )


def _trained(model: nn.Module, adapters: Iterable[str]) -> Iterable[tuple[str, Sequence[Tensor]]]:
    attachments = attachments_of(model)
    for name in adapters:
        for path, adapter in attachments.parameters_of(name):
            found = [p for p in adapter._parameters.values() if p is not None and p.requires_grad]
            if found:
                yield path, found


def _has_gradient(parameters: Iterable[Tensor]) -> bool:
    return any(p.grad is not None and bool(torch.count_nonzero(p.grad)) for p in parameters)
