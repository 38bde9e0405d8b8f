"""Several adapters that learn in one pass over one base, planned as they run: every row through its own adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from lorakit.attach import attach, detach, use
from lorakit.plan.architectures import Architecture
from lorakit.plan.counting import Counts
from lorakit.plan.memory import dtype_called, weights
from lorakit.plan.plan import Plan, Run, assumptions, train_step, training_memory
from lorakit.plan.rehearsal import Rehearsal, StepForm, empty_state
from lorakit.plan.work import step_flops


class JointRehearsal(Rehearsal):
    """A model with several adapters on the meta device; see `Rehearsal`."""

    def __init__(
        self, base: Architecture, adapters: Mapping[str, Counts], rows: Sequence[int], run: Run
    ) -> None:
        """Attach all of them.

        Args:
            base: The model on the meta device.
            adapters: What each holds, by its name.
            rows: How many rows of a batch go through each, in the same order; together ``run.batch``.
            run: How they are trained.
        """
        dtype = dtype_called(run.base_dtype)
        super().__init__(base.model, None, device=run.device, dtype=dtype)
        self.rows = dict(zip(adapters, rows, strict=True))
        for name, counts in adapters.items():
            adapter_dtype = dtype_called(run.adapter_dtype)
            attach(self.model, empty_state(counts), name=name, dtype=adapter_dtype, trainable=True)

    def close(self) -> None:
        """Take all adapters off again."""
        for name in self.rows:
            detach(self.model, name)

    def routed(self, entries: int) -> AbstractContextManager[object]:
        """Each row goes through its adapter."""
        route = [name for name, count in self.rows.items() for _ in range(count * entries)]
        return use(self.model, rows=route)


def plan_together(
    base: Architecture,
    adapters: Mapping[str, Counts],
    run: Run,
    rows: Sequence[int],
    *,
    form: StepForm | None = None,
) -> Plan:
    """The plan of adapters that learn in one pass.

    The counts of the plan are those of all adapters together; there is none for inference, where one acts at a time.

    Args:
        base: The model on the meta device.
        adapters: What each holds, by its name.
        run: How they are trained; its batch is that of all of them.
        rows: How many rows of a batch each learns from, in the same order.
        form: See `lorakit.plan.plan`.
    """
    counts = sum_of(list(adapters.values()))
    held = weights(base.model, dtype_called(run.base_dtype), run.storage)
    training = None
    if base.runs:
        rehearsal = JointRehearsal(base, adapters, rows, run)
        try:
            training = training_memory(counts, held, run, train_step(rehearsal, run, form))
        finally:
            rehearsal.close()
    return Plan(base, counts, run, training, None, held, (*base.notes, *assumptions(base, run)))


def flops_together(base: Architecture, adapters: Mapping[str, Counts], run: Run, rows: Sequence[int]) -> int:
    """As `lorakit.plan.work.training_flops`, of adapters that learn in one pass; see `plan_together`."""
    rehearsal = JointRehearsal(base, adapters, rows, run)
    try:
        return step_flops(rehearsal, run)
    finally:
        rehearsal.close()


def sum_of(counts: Sequence[Counts]) -> Counts:
    """What several adapters hold together; the spec is the first one's."""
    return replace(
        counts[0],
        sites=tuple(site for one in counts for site in one.sites),
        shared=sum(one.shared for one in counts),
        shared_trainable=sum(one.shared_trainable for one in counts),
    )
