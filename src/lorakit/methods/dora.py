"""DoRA: a trainable magnitude times a direction that another method changes, ``W = diag(m / n) V``.

``V = W0 + delta`` and ``n_j = |V_j|`` over the inputs of output feature ``j``; ``n`` is taken as constant in
the backward pass (section 4.3 of the paper: 24 % less training memory for no loss of accuracy).
Source: Liu et al. 2024 (arXiv 2402.09353), equations 5 and 11. The norm runs along each *output* feature.

Outside training ``m / n`` is remembered until a tensor that it depends on changes; in training the row norms of the
frozen base are. Both live beside the model and not in it, see `lorakit.ops.remembered`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.method import LowRankMethod, Tensors
from lorakit.core.registry import register
from lorakit.core.target import Shape, Target
from lorakit.methods.decomposed import Decomposed
from lorakit.ops import own_precision, row_norms, row_squares
from lorakit.ops.remembered import Remembered, tensors_in

_GAINS: Remembered[Tensor] = Remembered()
_SQUARES: Remembered[Tensor] = Remembered()


@register("dora")
@dataclass(frozen=True)
class DoRA(Decomposed):
    """Weight-decomposed adaptation over any method that defines a change of the weight.

    Parameters per target: those of ``inner``, and ``magnitude`` ``(*batch, out)``. The bias of the layer is
    not scaled.

    Attributes:
        inner: The method that changes the direction; ``DoRA(LoRA(r=8))`` is the paper's.
        detach_norm: Take the norm as constant in the backward pass. ``False`` is the full gradient of equation 6, which
            pushes each row at a right angle to itself; it costs memory and brought 0.2 points in the paper.
    """

    detach_norm: bool = True

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Those of the inner method, and ``magnitude`` ``(*batch, out)``."""
        return {**self.inner.shapes(shape), "magnitude": (*shape.batch, shape.out)}

    def norms(self, target: Target, p: Tensors, W: Tensor, squares: Tensor | None = None) -> Tensor:
        """``n = |W + delta|`` along each output feature, ``(*batch, out)``; by default constant in the backward pass.

        Args:
            target: The layer.
            p: Its parameters.
            W: The base weight.
            squares: The sums of the squares of its rows, if they are known.
        """
        wide = torch.promote_types(W.dtype, torch.float32)
        least = torch.finfo(wide).tiny ** 0.5  # a row of zeros has no direction, and stays zero
        # Autocast would round the products inside to its own dtype, and with them the magnitude's gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm), own_precision(W):
            if isinstance(self.inner, LowRankMethod):
                return row_norms(W, *self.inner.factors(target, p), squares=squares, least=least)
            return (W + self.inner.delta(target, p)).to(wide).norm(dim=-1).clamp_min(least)

    def _gain(self, target: Target, p: Tensors, training: bool) -> Tensor:
        """``m / n`` for a forward pass, remembered where nothing is trained."""
        # All that the layer keeps: of a quantised weight the codes and the scales.
        base = tensors_in(target.module._parameters, target.module._buffers)
        place = target.path, target.stored.dtype

        def fresh() -> Tensor:
            W = target.weight()
            squares = None
            if isinstance(self.inner, LowRankMethod):
                squares = _SQUARES.recall(base[0], place, base, None, lambda: row_squares(W))
            return p["magnitude"] / self.norms(target, p, W, squares)

        magnitude = p["magnitude"]
        if training:
            _GAINS.forget(magnitude)
            return fresh()
        return _GAINS.recall(magnitude, place, (*tensors_in(p), *base), self, fresh)

    def weight(self, target: Target, p: Tensors, W: Tensor) -> Tensor:
        """``diag(m / n) (W + delta)``."""
        gain = p["magnitude"] / self.norms(target, p, W)
        return gain.unsqueeze(-1).to(W.dtype) * self.inner.weight(target, p, W)

    def _magnitude_at(self, magnitude: Tensor, start: int, stop: int) -> Tensor:
        """One number for each row."""
        return magnitude[..., start:stop]

    def forward(self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
        """``(m / n) * (base + change) + (1 - m / n) * bias``: the bias is in the base output, and is not to be scaled.

        Where the magnitude is the norm every bit of the base output is kept. The inner dropout acts on the inner change
        alone; the base term sees the whole input (as in the paper).
        """
        gain = self._gain(target, p, training)
        y = self.inner.add_to(target, p, x, y, training=training)
        y = target.scale_out(y, gain.to(y.dtype))
        if target.bias is None:
            return y
        return target.scale_add_bias(y, target.bias * (1 - gain.flatten()), 1.0)
