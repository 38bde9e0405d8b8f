"""How much is computed in a training step, counted on the meta device with the model's own code."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode

from lorakit.plan.architectures import Architecture
from lorakit.plan.counting import Counts
from lorakit.plan.plan import Run, rehearse, train_step
from lorakit.plan.rehearsal import Rehearsal


def training_flops(base: Architecture, counts: Counts, run: Run) -> int:
    """Floating-point operations of the matrix products in one forward and backward pass.

    A multiplication with its addition counts as 2. What torch's counter does not know (the fused attention of the CPU)
    is not among them, nor is anything that is no matrix product: a run takes longer than these alone.
    """
    rehearsal = rehearse(base, counts, run)
    try:
        return step_flops(rehearsal, run)
    finally:
        rehearsal.close()


def step_flops(rehearsal: Rehearsal, run: Run) -> int:
    """The same of a rehearsal that is ready."""
    with FlopCounterMode(display=False) as counter:
        train_step(rehearsal, run)
    return int(counter.get_total_flops())
