"""The Hadamard product of two low-rank products, ``s (B1 A1) ∘ (B2 A2)``, and its closed-form gradients.

Written from stock operations, autograd keeps both dense products of every layer until the backward pass. Here it keeps
the four factors and nothing else; each product is formed again where its gradient needs it.

Shapes: ``B`` ``(*batch, out, r)``, ``A`` ``(*batch, r, in)``.
Sources: Hyeon-Woo et al. 2021 (arXiv 2108.06098), proposition 1; Yeh et al. 2023 (arXiv 2309.14859).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakit.ops.low_rank import transformed


def hadamard_low_rank(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * (B1 A1) ∘ (B2 A2)``, ``(*batch, out, in)``, of a rank of up to the product of both.

    Args:
        B1: ``(*batch, out, r1)``.
        A1: ``(*batch, r1, in)``.
        B2: ``(*batch, out, r2)``.
        A2: ``(*batch, r2, in)``.
        scale: A plain number.
    """
    if transformed() or not torch.is_grad_enabled():
        return _hadamard(B1, A1, B2, A2, scale)
    return _HadamardLowRank.apply(B1, A1, B2, A2, scale)


def _hadamard(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor, scale: float) -> Tensor:
    return (B1 * scale @ A1) * (B2 @ A2)


class _HadamardLowRank(torch.autograd.Function):
    """With ``D = dL/d(result)``: ``dB1 = s (D ∘ B2 A2) A1ᵀ``, ``dA1 = s B1ᵀ (D ∘ B2 A2)``, and so the other pair."""

    @staticmethod
    def forward(ctx: Any, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(B1, A1, B2, A2)
        return _hadamard(B1, A1, B2, A2, scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (D,) = grad_outputs
        B1, A1, B2, A2 = ctx.saved_tensors
        need = ctx.needs_input_grad
        first = _pair(D, B1, A1, B2 * ctx.scale @ A2, need[0], need[1])
        second = _pair(D, B2, A2, B1 * ctx.scale @ A1, need[2], need[3])
        return (*first, *second, None)


def _pair(
    D: Tensor, B: Tensor, A: Tensor, other: Tensor, need_B: bool, need_A: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of one pair, from the other pair's product."""
    # Under create_graph the products are differentiated themselves, and must not be overwritten.
    G = D * other if torch.is_grad_enabled() else other.mul_(D)
    dB = (G @ A.mT).to(B.dtype) if need_B else None
    dA = (B.mT @ G).to(A.dtype) if need_A else None
    return dB, dA
