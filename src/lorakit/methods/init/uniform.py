"""Uniform numbers as wide as the inputs that they weigh, for tensors that are no plain pair of factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fan_in_uniform(
    size: tuple[int, ...],
    generator: torch.Generator | None,
    *,
    stack: int = 0,
    gain: float = 1 / math.sqrt(3),
) -> Tensor:
    """``U(-b, b)`` with ``b = gain sqrt(3 / fan_in)``, in float32 on the CPU.

    Torch's ``kaiming_uniform_``: the default gain is that of ``a=sqrt(5)``, so ``b = 1 / sqrt(fan_in)``.

    Args:
        size: Of the tensor: ``stack`` leading dimensions, the rows, and the rest, whose product is the fan-in.
        generator: The source; by default torch's own.
        stack: Leading dimensions that count matrices.
        gain: ``sqrt(2)`` is He et al.'s for rectifiers.
    """
    fan_in = math.prod(size[stack + 1 :])
    bound = math.sqrt(3.0) * (
        gain / math.sqrt(fan_in)
    )  # in this order: the bits are those of other libraries
    return torch.empty(size, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
