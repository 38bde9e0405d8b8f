"""DoRA with a magnitude for each *input* channel, ``W = V diag(m / n)``: LyCORIS's first ``dora_scale``.

``V = W0 + delta`` and ``n_c = |V[:, c]|`` over the outputs (and the kernel's positions); constant in the backward pass.
Source: KohakuBlueleaf/LyCORIS, ``weight_decompose`` with ``wd_on_output=False``, its only form before version 3, which
reads Liu et al. 2024 (arXiv 2402.09353) with the axes the other way round. LyCORIS adds an epsilon to the norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.method import LowRankMethod, Tensors
from lorakit.core.registry import register
from lorakit.core.target import Shape, Target
from lorakit.methods.decomposed import Decomposed
from lorakit.ops import own_precision

_SQUARES = "squares over rows"  # no name of a parameter: it is never stored


@register("dora_input")
@dataclass(frozen=True)
class InputDoRA(Decomposed):
    """Weight decomposition along the inputs, for files that were trained so; for new adapters use `DoRA`.

    Parameters per target: those of ``inner``, and ``magnitude`` ``(*batch, channels)``, one number for each input
    feature, of a convolution for each input channel.

    Attributes:
        inner: The method that changes the direction.
    """

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Those of the inner method, and ``magnitude`` ``(*batch, channels)``."""
        return {**self.inner.shapes(shape), "magnitude": (*shape.batch, shape.channels)}

    def norms(self, target: Target, p: Tensors, W: Tensor) -> Tensor:
        """``n = |W + delta|`` along each input channel, ``(*batch, channels)``; constant in the backward pass."""
        wide = torch.promote_types(W.dtype, torch.float32)
        squares = p[_SQUARES] if _SQUARES in p else self.sums_over_rows(target, p, W)[_SQUARES]
        least = torch.finfo(wide).tiny ** 0.5  # a column of zeros has no direction, and stays zero
        return squares.sqrt().clamp_min(least)

    def sums_over_rows(self, target: Target, p: Tensors, W: Tensor) -> Tensors:
        """The squares of ``W + delta`` for each input channel, in at least float32."""
        wide = torch.promote_types(W.dtype, torch.float32)
        with torch.no_grad(), own_precision(W):
            squares = self.inner.weight(target, p, W.to(wide)).square().sum(-2)
        return {_SQUARES: squares.unflatten(-1, (target.shape.channels, -1)).sum(-1)}

    def _magnitude_at(self, magnitude: Tensor, start: int, stop: int) -> Tensor:
        """All of it, for every row."""
        return magnitude

    def weight(self, target: Target, p: Tensors, W: Tensor) -> Tensor:
        """``(W + delta) diag(m / n)``, with one factor for all of a kernel's positions."""
        gain = p["magnitude"] / self.norms(target, p, W)
        columns = gain.repeat_interleave(math.prod(target.shape.kernel), -1).unsqueeze(-2)
        return columns.to(W.dtype) * self.inner.weight(target, p, W)

    def forward(self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
        """``y`` and what the layer makes of ``x`` with the change of the weight; at the start every bit of ``y``."""
        W = target.weight()
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        with own_precision(W):
            change = self.weight(target, p, W) - W
        return y + target.apply(x, change.to(y.dtype))

    def supports(self, target: Target) -> str | None:
        """What has input features, and the inner method supports without dropout: the new weight is formed."""
        if target.shape.lookup:
            return "its input is an index, which has no features to give a magnitude"
        if isinstance(self.inner, LowRankMethod) and self.inner.input_dropout:
            return "the new weight acts on the whole input: use dropout=0 inside InputDoRA"
        return super().supports(target)
