"""Int8: eight bits a number, one scale for each row.

Each row of a matrix (the weights of one output feature) is divided by its largest magnitude and rounded to the nearest
of 255 equally spaced values. Codes, scales and values are those of bitsandbytes' row-wise form bit for bit.
Source: Dettmers et al. 2022 (arXiv 2208.07339), section 2.1, for the weights alone: inputs are not quantised here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.errors import ConfigError
from lorakit.ops.packed import Packed

# 1 / 127 as bitsandbytes writes it.
_STEP = 7.874015718698502e-3
_CHUNK = 2**18


@dataclass(frozen=True, eq=False)
class Int8(Packed):
    """A tensor in row-wise int8.

    Attributes:
        codes: int8, in the size of the tensor.
        absmax: The largest magnitude of each row, ``(rows,)`` float32.
        size: Of the dense tensor.
    """

    codes: Tensor
    absmax: Tensor
    size: tuple[int, ...]

    fields: ClassVar[tuple[str, ...]] = ("codes", "absmax")

    def with_tensors(self, tensors: dict[str, Tensor]) -> Int8:
        """The same form with other stored tensors."""
        return replace(self, **{name: tensors.get(name) for name in self.fields})  # type: ignore[arg-type]

    def unpacked(self) -> Int8:
        """Itself: the scales are kept in full."""
        return self

    def step(self) -> int:
        """Every row has its own scale."""
        return 1

    def fill(self, out: Tensor, start: int) -> None:
        """``code * absmax / 127``."""
        rows = slice(start, start + out.shape[0])
        # A copy converts whole vectors of int8; a product of int8 and float32 goes number by number.
        out.copy_(self.codes.view(-1, out.shape[-1])[rows]).mul_(self.absmax[rows].unsqueeze(-1)).mul_(_STEP)

    def values(self) -> Tensor:
        """The same in plain operations."""
        rows = self.codes.reshape(self.absmax.numel(), -1)
        return (rows * self.absmax.unsqueeze(-1) * _STEP).view(self.size)


def quantize_int8(W: Tensor) -> Int8:
    """Code a matrix in int8, row by row. Lossy: an error of at most half a 127th of the row's largest number.

    Args:
        W: Floating-point, ``(..., in)``; computed in float32. A row of zeros stays zero.

    Raises:
        ConfigError: A value is not finite.
    """
    width = W.shape[-1]
    rows = W.detach().reshape(-1, width)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=W.device)
    absmax = torch.empty(rows.shape[0], dtype=torch.float32, device=W.device)
    with torch.no_grad():
        span = max(1, _CHUNK // max(1, width)) if W.device.type == "cpu" else max(1, rows.shape[0])
        for first in range(0, rows.shape[0] if not W.is_meta else 0, span):
            part = rows[first : first + span].float()
            largest = torch.amax(part.abs(), -1, out=absmax[first : first + span])
            steps = torch.where(largest == 0, 0, 127.0 / largest)
            codes[first : first + span] = (part * steps.unsqueeze(-1)).round_()
        if not W.is_meta and absmax.numel() and not math.isfinite(float(absmax.sum())):
            raise ConfigError("int8 cannot hold a NaN or an infinity, and this tensor has one.")
    return Int8(codes.view(W.shape), absmax, tuple(W.shape))
