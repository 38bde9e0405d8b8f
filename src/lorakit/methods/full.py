"""Full fine-tuning as an adapter: a trained copy stands in for a parameter, the base stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.core.method import Tensors, WeightMethod
from lorakit.core.registry import register
from lorakit.core.selection import Adapts
from lorakit.core.target import Shape, Target


@register("full")
@dataclass(frozen=True)
class FullFineTuning(WeightMethod):
    """Train the chosen parameters themselves, in a copy that belongs to the adapter.

    Because the copy is the adapter's, it switches, merges, unmerges and saves like any other, and several
    tasks can each have their own (what PEFT calls ``modules_to_save``). Parameters per target: ``value``, the
    size of the weight.
    """

    roles: ClassVar[Mapping[str, str]] = {"value": "copy"}
    default_targets: ClassVar[str] = "all-parameters"
    adapts: ClassVar[Adapts] = "parameter"

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """``value``, the size of the weight."""
        return {"value": (*shape.batch, shape.out, shape.in_)}

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """A copy of the base."""
        return {"value": target.weight().clone()}

    def weight(self, target: Target, p: Tensors, W: Tensor) -> Tensor:
        """The copy."""
        return p["value"].to(W.dtype)

    def along_rows(self, shape: Shape) -> Mapping[str, int] | None:
        """The copy."""
        return {"value": -2}
