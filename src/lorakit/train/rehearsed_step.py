"""How the planner rehearses a step whose parts run compiled: training's own code, on kernels that know only sizes.

What `lorakit.train.fused_layers` and `lorakit.train.head_loss` keep for the backward pass is so read off, as all else
in a rehearsal is, and nothing of it is said twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.ops.fused import sizes_only
from lorakit.ops.native.training import kernels
from lorakit.plan import Run
from lorakit.plan.rehearsal import taken
from lorakit.train.for_a_while import with_forwards
from lorakit.train.fused_layers import forms_by_looks
from lorakit.train.head_loss import head_aside, head_loss
from lorakit.train.loss import NEXT_TOKEN
from lorakit.train.task import Task


@dataclass(frozen=True)
class CompiledStep:
    """A step as `lorakit train` runs it, for `lorakit.plan.rehearsal.Rehearsal`.

    Attributes:
        compiled: Whether layers run in their compiled form.
        in_parts: Whether logits are made of some tokens at a time.
        native: Whether the compiled functions take its numbers, which the loss uses whatever becomes of the layers.
    """

    compiled: bool
    in_parts: bool
    native: bool = True

    @property
    def words(self) -> tuple[str, ...]:
        """What a plan takes for granted by it."""
        layers = ("norms, gates and attention of blocks made as Llama's run compiled (train.fused)",)
        parts = ("logits are made of some tokens at a time where nothing comes after the output layer",)
        return (layers if self.compiled else ()) + (parts if self.in_parts else ())

    @contextmanager
    def during(self, model: nn.Module, documents: int, length: int) -> Iterator[None]:
        """What a model is rehearsed in; ``documents`` of this length lie in a row."""
        with ExitStack() as stack:
            if self.native and (library := kernels()) is not None:
                if self.compiled:
                    forms = forms_by_looks(model, packs=documents > 1, length=length)
                    stack.enter_context(with_forwards(forms))
                stack.enter_context(sizes_only(library))
            yield

    def loss(self, model: Any, inputs: Mapping[str, Any], learnt: int) -> Tensor | None:
        """The loss of a batch, of which some tokens are learnt; None where it is made of whole logits."""
        head = getattr(model, "get_output_embeddings", lambda: None)() if self.in_parts else None
        if not isinstance(head, nn.Module):
            return None
        with head_aside(model, head):
            hidden, last = _given(model, inputs)
        if hidden is not last:  # logits are scaled or capped after the layer
            return None
        hidden = taken(hidden, learnt)
        return head_loss(hidden, head, torch.empty(len(hidden), dtype=torch.long, device=hidden.device))


def compiled_step(task: Task, run: Run) -> CompiledStep | None:
    """How the steps of a task run, or None where that is the model's own code.

    Args:
        task: Of the recipe.
        run: As it is planned.
    """
    settings = task.recipe.train
    native = run.device == "cpu" and run.base_dtype == "float32" and kernels() is not None
    compiled = native and settings.fused and not settings.compile
    in_parts = getattr(task, "objective", None) is NEXT_TOKEN  # some tasks know theirs late
    return CompiledStep(compiled, in_parts, native) if compiled or in_parts else None


def _given(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What a model gives, and what its output layer, which is aside, let through last."""
    through: list[Tensor] = []
    aside = [module for module in model.modules() if type(module) is nn.Identity]
    hooks = [m.register_forward_hook(lambda _, __, output: through.append(output)) for m in aside]
    try:
        logits: Tensor = model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits, through[-1]
