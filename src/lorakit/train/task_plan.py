"""The planner (`lorakit.plan`) asked about a task: its adapter or its several, on its largest batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.core import Method
from lorakit.errors import LorakitError
from lorakit.models.fastest_dtype import fastest_dtype
from lorakit.plan import Architecture, Plan, Run, plan
from lorakit.plan.counting import Counts, count
from lorakit.plan.device_kernels import Device
from lorakit.plan.together import flops_together, plan_together
from lorakit.plan.work import training_flops
from lorakit.train.recipe import Recipe
from lorakit.train.rehearsed_step import compiled_step
from lorakit.train.task import Task


@dataclass(frozen=True)
class Shape:
    """The largest batch of a run, and the whole of it.

    Attributes:
        rows: Rows of the largest batch as the model reads it: of a pair of texts, two.
        length: Tokens of each of its rows, padding counted; the mean of them where they are packed.
        packed: Whether they lie end to end.
        learnt: The share of its positions whose logits the loss needs; of an encoder-decoder, of those that it writes.
        tokens: Tokens of all batches of the run; None where the data was not read.
        steps: Optimizer steps; None likewise.
        measured: Whether this comes from the data and not from the recipe alone.
        shares: How many of the rows each of several adapters learns from; empty for one adapter.
        distinct: Tokens of all rows that the run reads, each row once; None where the data was not read.
        selected: The share of its positions that are learnt in any row, for which a model that can leave some out
            makes logits; None for ``learnt``.
        padded: Whether some of its rows are filled up.
        written: Tokens that an encoder-decoder writes in each row; 0 for other models.
    """

    rows: int
    length: int
    packed: bool
    learnt: float = 1.0
    tokens: int | None = None
    steps: int | None = None
    measured: bool = False
    shares: tuple[int, ...] = ()
    distinct: int | None = None
    selected: float | None = None
    padded: bool = False
    written: int = 0

    @property
    def size(self) -> int:
        """Tokens of the largest batch, padding counted."""
        return self.rows * (self.length + self.written)


def task_plan(task: Task, base: Architecture, shape: Shape) -> Plan:
    """The planner's answer for a run on a model.

    Args:
        task: Of the recipe; what its model's head is trained for is counted where its labels are known.
        base: The model on the meta device.
        shape: Of the largest batch.
    """
    run = _run(task.recipe, shape)
    form = compiled_step(task, run)
    if len(task.parts) > 1:
        planned = plan_together(base, adapters_of(task, base), run, shape.shares, form=form)
    else:
        method, targets = _attachable(task.parts[0], base)
        exclude = task.parts[0].recipe.adapter.exclude
        planned = plan(base, method, targets, exclude=exclude, run=run, form=form)
    words = () if form is None else form.words
    return dataclasses.replace(planned, assumptions=(*planned.assumptions, *words))


def step_flops(task: Task, base: Architecture, planned: Plan, shape: Shape) -> int:
    """Floating-point operations of a step of the largest batch, see `lorakit.plan.work.training_flops`."""
    if len(task.parts) > 1:
        return flops_together(base, adapters_of(task, base), planned.run, shape.shares)
    return training_flops(base, planned.counts, planned.run)


def adapters_of(task: Task, base: Architecture) -> dict[str, Counts]:
    """What each adapter of a task holds, by its name."""
    found = {}
    for part in task.parts:
        section = part.recipe.adapter
        method, targets = _attachable(part, base)
        found[section.name] = count(base.model, method, targets, section.exclude)
    return found


def _attachable(task: Task, base: Architecture) -> tuple[Method | Mapping[Any, Method], Any]:
    section = task.recipe.adapter
    try:
        task.accept(base.model)
        return task.adapter(base.model)
    except (LorakitError, AttributeError):
        # A head whose labels are not known yet: the body's adapter is what counts.
        return section.adapter(), section.targets


def _run(recipe: Recipe, shape: Shape) -> Run:
    settings = recipe.train
    device: Device = "cuda" if _device(recipe).type == "cuda" else "cpu"
    return Run(
        batch=shape.rows,
        length=shape.length,
        device=device,
        dtype=_dtype(recipe, device),
        storage=recipe.model.quantize or "dense",
        checkpointing=settings.activation_checkpointing is True,
        packing=shape.packed,
        learnt=shape.learnt,
        accumulation=settings.accumulation,
        selected=shape.selected,
        padded=shape.padded,
        written=shape.written or None,
    )


def _device(recipe: Recipe) -> torch.device:
    if recipe.model.device is not None:
        return torch.device(recipe.model.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(recipe: Recipe, device: str) -> str:
    asked = recipe.model.dtype
    if asked == "fastest":
        return str(fastest_dtype(device)).removeprefix("torch.")
    return "" if asked == "auto" else asked
