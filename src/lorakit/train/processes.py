"""What an adapter's methods do beside gradient descent (`lorakit.core.TrainingProcess`), inside transformers' loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.core import TrainingProcess
from lorakit.errors import TrainingError
from lorakit.train.learners import Learner, parameters_of

_STATE = "lorakit_processes.pt"


class Processes(TrainerCallback):
    """Calls the processes at each place of an optimizer step; keeps their state in checkpoints."""

    def __init__(self, processes: Sequence[TrainingProcess]) -> None:
        self.processes = tuple(processes)
        self._penalty_is_due = False

    def penalty_once(self) -> Tensor | None:
        """The sum of the penalties at the first call in an optimizer step; None after that, or where there is none."""
        if not self._penalty_is_due:
            return None
        self._penalty_is_due = False
        total: Tensor | None = None
        for process in self.processes:
            penalty = process.penalty()
            if isinstance(penalty, Tensor) or penalty != 0:
                total = torch.as_tensor(penalty) if total is None else total + penalty
        return total

    # ---- kept in checkpoints
    def save(self, checkpoint: Path) -> None:
        """Write what a resumed run needs."""
        if self.processes:
            torch.save([process.state_dict() for process in self.processes], checkpoint / _STATE)

    def restore(self, checkpoint: Path) -> None:
        """Take up the state of a checkpoint.

        Raises:
            TrainingError: It belongs to other processes.
        """
        path = checkpoint / _STATE
        states = torch.load(path, weights_only=True) if path.is_file() else []
        if len(states) != len(self.processes):
            raise TrainingError(
                f"{checkpoint} holds the state of {len(states)} training processes; the adapter has "
                f"{len(self.processes)}. Start a new run with another output."
            )
        for process, state in zip(self.processes, states, strict=True):
            process.load_state_dict(state)

    # ---- called by transformers
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Before the first forward pass of a step."""
        self._penalty_is_due = True
        for process in self.processes:
            process.before_forward(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Gradients are complete and clipped."""
        for process in self.processes:
            process.before_step(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The optimizer has stepped, and the gradients are still there."""
        for process in self.processes:
            process.after_step(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Training has ended, perhaps early; what was saved for a resume was saved before."""
        for process in self.processes:
            process.finish()


class ClipEach(TrainerCallback):
    """Scales each adapter's gradients down by themselves, where transformers would take them all together."""

    def __init__(self, learners: Sequence[Learner], most: float) -> None:
        self.learners, self.most = tuple(learners), most

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Gradients are complete."""
        for learner in self.learners:
            parameters = list(parameters_of(given["model"], learner.name))
            if state.global_step >= learner.steps:  # its data are used up: it must not move on its momentum
                for parameter in parameters:
                    parameter.grad = None
            elif self.most > 0:
                torch.nn.utils.clip_grad_norm_(parameters, self.most)
