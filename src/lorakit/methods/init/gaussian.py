"""The paper's start: ``A`` Gaussian, ``B`` zero."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.target import Target
from lorakit.methods.init.kaiming import reversed_for_lookup


def gaussian(target: Target, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """``A ~ N(0, 1/r²)`` (standard deviation ``1/r``, as in PEFT), ``B = 0``; embeddings reversed."""
    if target.shape.lookup:
        return reversed_for_lookup(target, r, generator)
    A = torch.empty(*target.batch, r, target.in_).normal_(std=1 / r, generator=generator)
    return A, torch.zeros(*target.batch, target.out, r)
