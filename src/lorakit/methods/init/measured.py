"""A start that was computed from data beforehand, see `lorakit.eva` and `lorakit.lora_ga`."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.target import Target


def measured(target: Target, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The factors that were measured for this target."""
    assert target.measured is not None, target.path
    return target.measured
