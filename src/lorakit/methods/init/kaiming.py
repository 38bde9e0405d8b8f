"""The usual start: ``A`` Kaiming-uniform, ``B`` zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorakit.core.target import Target


def kaiming(target: Target, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """``A ~ U(-1/sqrt(in), 1/sqrt(in))``, ``B = 0``: as in loralib and PEFT.

    An embedding starts the other way round, ``A = 0`` and ``B ~ N(0, 1)``: its input is one-hot, so a zero
    ``B`` would leave a gradient on one row of ``A`` at a time.
    """
    if target.shape.lookup:
        return reversed_for_lookup(target, r, generator)
    bound = 1 / math.sqrt(target.in_)
    A = torch.empty(*target.batch, r, target.in_).uniform_(-bound, bound, generator=generator)
    return A, torch.zeros(*target.batch, target.out, r)


def reversed_for_lookup(target: Target, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """``A = 0``, ``B ~ N(0, 1)``: the start of an embedding (loralib, PEFT)."""
    return torch.zeros(r, target.in_), torch.empty(target.out, r).normal_(generator=generator)
