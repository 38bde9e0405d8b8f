"""What a method does beside gradient descent while its adapter is trained.

Most methods need nothing. AdaLoRA moves ranks between targets, DyLoRA draws the rank of each step, LoRA-FA corrects
gradients. Such a method returns a `TrainingProcess` from `Method.process`, and whoever runs the loop calls it::

    for step, batch in enumerate(batches):
        process.before_forward(step)
        loss = model(batch) + process.penalty()
        loss.backward()
        process.before_step(step)
        optimizer.step()
        process.after_step(step)
        optimizer.zero_grad()
    process.finish()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from lorakit.core.method import Method
    from lorakit.core.target import Target


class Site(NamedTuple):
    """One target of an adapter that is on a model: where it is, its method, and its live parameters."""

    path: str
    target: Target
    method: Method
    parameters: Mapping[str, nn.Parameter]


class TrainingProcess:
    """Runs along with a training loop. Every step is optional; ``step`` counts optimizer steps from 0."""

    def before_forward(self, step: int) -> None:
        """Before the (first) forward pass of a step."""

    def penalty(self) -> Tensor | float:
        """What is added to the loss, once per optimizer step; 0 when there is nothing."""
        return 0.0

    def before_step(self, step: int) -> None:
        """The gradients are complete (and clipped), the optimizer has not used them yet."""

    def after_step(self, step: int) -> None:
        """The optimizer has stepped; the gradients that it used are still there."""

    def finish(self) -> None:
        """Training has ended, perhaps early."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold for an exact resume: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
