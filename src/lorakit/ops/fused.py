"""The parts of a decoder between its matrix products, compiled and with derivatives that keep little.

| | torch's operations keep | here |
|---|---|---|
| RMS norm | its input, and its output for the products after it | the output |
| SwiGLU | gate, its SiLU, what it lets through, the product | gate, what it lets through, the product |
| attention | turned queries and keys, repeated keys and values, outputs twice | queries, keys, values, outputs |
| cross-entropy | logits, their log-softmax | nothing: it makes its gradient at once |

Each function returns None for what it does not take (another device or dtype, a traced call, no library): then torch's
operations are to be used. The derivatives cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops.low_rank import Deferred, transformed
from lorakit.ops.native.training import AttentionInputs, Kernels, kernels


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor | None:
    """``weight * x / sqrt(mean(x²) + epsilon)`` over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    Args:
        x: ``(..., n)``.
        weight: ``(n,)``, frozen, no entry 0: the derivative is made from the output.
        epsilon: Inside of the root.
    """
    library = _library(x, weight)
    if library is None or (weight.requires_grad and torch.is_grad_enabled()):
        return None
    return _RmsNorm.apply(x, weight, epsilon, library)


def swiglu(gate: Tensor, up: Tensor) -> Tensor | None:
    """``silu(gate) * up``, entry by entry (Shazeer 2020, arXiv 2002.05202)."""
    library = _library(gate, up)
    return None if library is None or gate.shape != up.shape else _Swiglu.apply(gate, up, library)


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, borders: Tensor, scale: float
) -> Tensor | None:
    """Causal attention inside each of several documents that lie end to end, with rotary positions.

    A document's numbers are the same bit for bit whatever lies beside it. Rotary positions: Su et al. 2021 (arXiv
    2104.09864), halves turned against each other.

    Args:
        q: ``(1, tokens, heads * n)``, as a projection makes it.
        k: ``(1, tokens, kv_heads * n)``.
        v: ``(1, tokens, kv_heads * n)``.
        cos: ``(1, tokens, n)``.
        sin: ``(1, tokens, n)``.
        borders: ``(documents + 1,)``: the first token of each document, and the end.
        scale: Of the scores.

    Returns:
        ``(1, tokens, heads * n)``.
    """
    library = _library(q, k, v, cos, sin)
    if library is None or q.shape[0] != 1 or not library.takes_heads(cos.shape[-1]):
        return None
    return _DocumentAttention.apply(q, k, v, cos, sin, borders.to(torch.int64), scale, library)


def add_together(x: Tensor, products: Sequence[Deferred]) -> bool:
    """Add the low-rank products of layers that read the same input, each in place: ``y_i += s_i x A_iᵀ B_iᵀ``.

    ``x`` is read once for all of them, and once more for all their derivatives, of which one ``dx`` is made.

    Args:
        x: ``(..., in)``.
        products: From `lorakit.ops.low_rank.deferred`.

    Returns:
        Whether it was done; nothing was changed otherwise.
    """
    ys, As, Bs = ([getattr(product, name) for product in products] for name in ("y", "A", "B"))
    library = _library(x, *ys, *As, *Bs)
    if library is None or not x.is_contiguous():
        return False
    _AddTogether.apply(x, [product.scale for product in products], library, *ys, *As, *Bs)
    return True


def cross_entropy(logits: Tensor, targets: Tensor, gradient: Tensor | None = None) -> Tensor | None:
    """``-log softmax(logits)[target]`` of each row ``(rows,)``; not differentiable, but it can tell the derivative.

    Args:
        logits: ``(rows, n)``.
        targets: ``(rows,)``, each from 0 to n - 1.
        gradient: ``(rows, n)``; gets the derivative of the sum of the losses, if given. It may be ``logits`` itself.
    """
    given = (logits,) if gradient is None else (logits, gradient)
    library = _library(*(t.detach() for t in given))
    return None if library is None else library.cross_entropy(*given[:1], targets.contiguous(), *given[1:])


def _library(*tensors: Tensor) -> Kernels | None:
    """The compiled functions, if they take these tensors."""
    device = "cpu" if _sizes is None else "meta"
    for t in tensors:
        if t.device.type != device or t.dtype is not torch.float32 or type(t) not in _PLAIN or not t.numel():
            return None
    return None if transformed() else _sizes or kernels()


_PLAIN = (Tensor, torch.nn.Parameter)
_sizes: Kernels | None = None


class _SizesOnly(Kernels):
    """Functions that make what the library's make, and leave it empty."""

    def __init__(self, library: Kernels) -> None:
        for name, value in vars(library).items():
            setattr(self, name, _nothing if callable(value) else value)


def _nothing(*given: Any) -> None:
    """A compiled function that is not called."""


@contextmanager
def sizes_only(library: Kernels) -> Iterator[None]:
    """Inside a ``with`` block tensors of the meta device are taken, which have sizes and no numbers, and no others.

    What is kept for a backward pass can so be rehearsed; see `lorakit.plan`.
    """
    global _sizes
    before, _sizes = _sizes, _SizesOnly(library)
    try:
        yield
    finally:
        _sizes = before


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, library: Kernels) -> Tensor:
        y, factors = library.rms_norm(x.contiguous(), weight.contiguous(), epsilon)
        ctx.library = library
        ctx.save_for_backward(y, weight, factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, factors = ctx.saved_tensors
        return ctx.library.rms_norm_back(dy.contiguous(), y, weight.contiguous(), factors), None, None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, library: Kernels) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.library = library
        ctx.save_for_backward(gate, up)
        return library.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.library.swiglu_back(dy.contiguous(), *ctx.saved_tensors), None


class _AddTogether(torch.autograd.Function):
    """``h_i = s_i x A_iᵀ``, ``dB_i = G_iᵀ h_i``, ``dh_i = s_i G_i B_i``, ``dA_i = dh_iᵀ x``, ``dx = Σ dh_i A_i``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Sequence[float], library: Kernels, *given: Tensor
    ) -> tuple[Tensor, ...]:
        number = len(scales)
        ys, As, Bs = given[:number], given[number : 2 * number], given[2 * number :]
        A = torch.cat(As)
        ranks = [len(a) for a in As]
        h = library.project(x, A, 1.0)
        hs = [(part * scale).contiguous() for part, scale in zip(h.split(ranks, 1), scales, strict=True)]
        for y, part, B in zip(ys, hs, Bs, strict=True):
            library.expand(part, B.t().contiguous(), y, add=True)
        ctx.library, ctx.scales, ctx.ranks = library, scales, ranks
        ctx.save_for_backward(x, *As, *Bs, *hs)
        ctx.mark_dirty(*ys)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        library, scales, number = ctx.library, ctx.scales, len(ctx.scales)
        x, *rest = ctx.saved_tensors
        As, Bs, hs = rest[:number], rest[number : 2 * number], rest[2 * number :]
        Gs = [G.contiguous() for G in gradients]
        dBs = [library.collect(part, G).t() for part, G in zip(hs, Gs, strict=True)]
        dhs = [library.project(G, B.t().contiguous(), s) for G, B, s in zip(Gs, Bs, scales, strict=True)]
        dh = torch.cat(dhs, 1)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            library.expand(dh, torch.cat(As), dx, add=False)
        dAs = library.collect(dh, x).split(ctx.ranks)
        return dx, None, None, *Gs, *dAs, *dBs


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        borders: Tensor,
        scale: float,
        library: Kernels,
    ) -> Tensor:
        q, k, v, cos, sin = (t.contiguous()[0] for t in (q, k, v, cos, sin))
        y, logs = library.attention(AttentionInputs(q, k, v, cos, sin, borders, scale))
        ctx.library, ctx.scale = library, scale
        ctx.save_for_backward(q, k, v, cos, sin, borders, y, logs)
        return y[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin, borders, y, logs = ctx.saved_tensors
        given = AttentionInputs(q, k, v, cos, sin, borders, ctx.scale)
        changes = ctx.library.attention_back(dy.contiguous()[0], given, y, logs)
        return *(d[None] for d in changes), None, None, None, None, None
