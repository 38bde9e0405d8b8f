"""The parts of a decoder between its matrix products, compiled and with derivatives that keep little.

| | torch's operations keep | here |
|---|---|---|
| RMS norm | its input, and its output for the products after it | the output |
| SwiGLU | gate, its SiLU, what it lets through, the product | gate and what it lets through |
| LoRA | for each layer its input and ``x Aᵀ`` | the same, and the derivatives of an input are summed in one place |
| attention | turned queries and keys, repeated keys and values, outputs twice | queries, keys, values, outputs |
| cross-entropy | logits, their log-softmax | nothing: it makes its gradient at once |

Each function returns None for what it does not take (another device or dtype, a traced call, no library): then torch's
operations are to be used. The derivatives cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops.low_rank import transformed
from lorakit.ops.native.training import AttentionInputs, Kernels, ProductInputs, kernels


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


class Reading(NamedTuple):
    """A frozen layer and its low-rank change: ``x Wᵀ + b + scale * x Aᵀ Bᵀ``.

    Attributes:
        weight: ``W``, ``(out, in)``, frozen.
        bias: ``(out,)``, frozen, or None.
        A: ``(r, in)``.
        B: ``(out, r)``.
        scale: Of the product.
    """

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float


def read(x: Tensor, readings: Sequence[Reading]) -> tuple[Tensor, ...] | None:
    """What layers give that read the same input, ``(..., out)`` each.

    For the low-rank changes ``x`` is read once, and the outputs' derivatives once more for all that is made of them;
    the derivative of ``x`` is summed up in one place.

    Args:
        x: ``(..., in)``.
        readings: The layers.
    """
    return _read(x, readings, gated=False)


def read_gated(x: Tensor, gate: Reading, up: Reading, down: Reading) -> Tensor | None:
    """``down(silu(gate(x)) * up(x))``: the perceptron of a decoder's block (Shazeer 2020, arXiv 2002.05202).

    What goes through the gate is not kept: it is made again where its derivatives are.

    Args:
        x: ``(..., in)``.
        gate: The layer whose output decides.
        up: The layer whose output is let through; as large.
        down: The layer that reads it.
    """
    if gate.weight.shape != up.weight.shape:
        return None
    done = _read(x, (gate, up, down), gated=True)
    return None if done is None else done[0]


def _read(x: Tensor, readings: Sequence[Reading], gated: bool) -> tuple[Tensor, ...] | None:
    frozen = [t for reading in readings for t in (reading.weight, reading.bias) if t is not None]
    factors = [t for reading in readings for t in (reading.A, reading.B)]
    library = _library(x, *frozen, *factors)
    if library is None or not x.is_contiguous() or any(t.requires_grad for t in frozen):
        return None
    way = _ReadGated if gated else _Read
    return way.apply(x, readings, library, *factors)


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


class _Read(torch.autograd.Function):
    """``y_i = x W_iᵀ + b_i + h_i B_iᵀ`` with ``h_i = s_i x A_iᵀ``.

    With ``G_i = dL/dy_i``: ``dB_i = G_iᵀ h_i``, ``dh_i = s_i G_i B_i``, ``dA_i = dh_iᵀ x``,
    ``dx = Σ G_i W_i + dh_i A_i``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, readings: Sequence[Reading], library: Kernels, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.library, ctx.layers = library, _Layers.of(readings)
        given = ctx.layers.products(_rows(x), factors)
        ys = ctx.layers.outputs(given.x)
        h, _ = library.add_products(given, ys, gated=False)
        ctx.save_for_backward(x, h, *factors)
        return tuple(_as_input(y, x) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *factors = ctx.saved_tensors
        given, dys = ctx.layers.products(_rows(x), factors), [_rows(G.contiguous()) for G in gradients]
        dx, dA, dBs = ctx.library.add_products_back(given, h, dys, onward=ctx.needs_input_grad[0])
        dx = ctx.layers.onto(dx, dys)
        return dx if dx is None else dx.view_as(x), None, None, *_by_layer(dA, dBs)


class _ReadGated(torch.autograd.Function):
    """``z = silu(y_0) * y_1`` of two layers as in `_Read`, and a third that reads it; ``z`` is made anew backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, readings: Sequence[Reading], library: Kernels, *factors: Tensor
    ) -> tuple[Tensor]:
        ctx.library, ctx.layers, ctx.last = library, _Layers.of(readings[:2]), _Layers.of(readings[2:])
        given = ctx.layers.products(_rows(x), factors[:4])
        ys = ctx.layers.outputs(given.x)
        h, z = library.add_products(given, ys, gated=True)
        assert z is not None
        given = ctx.last.products(z, factors[4:])
        out = ctx.last.outputs(z)
        last_h, _ = library.add_products(given, out, gated=False)
        ctx.save_for_backward(x, h, last_h, *ys, *factors)
        return (_as_input(out[0], x),)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        library: Kernels = ctx.library
        x, h, last_h, gate, up, *factors = ctx.saved_tensors
        G = _rows(gradient.contiguous())
        last_A, last_B = factors[4].contiguous(), factors[5].t().contiguous()
        dz, last_dh, last_dB = library.add_product_back_onto(last_A, last_B, ctx.last.scales[0], last_h, G)
        ctx.last.onto(dz, [G])
        given, onward = ctx.layers.products(_rows(x), factors[:4]), ctx.needs_input_grad[0]
        dys, dx, dA, dBs, last_dA = library.gated_products_back(
            given, h, (gate, up), dz, last_dh, onward=onward
        )
        dx = ctx.layers.onto(dx, dys)
        first = _by_layer(dA, dBs)
        return dx if dx is None else dx.view_as(x), None, None, *first, last_dA, last_dB.t()


class _Layers(NamedTuple):
    """The frozen part of layers that read the same input."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    scales: Sequence[float]

    @classmethod
    def of(cls, readings: Sequence[Reading]) -> _Layers:
        weights, biases, _, _, scales = zip(*readings, strict=True)
        return cls(weights, biases, scales)

    def products(self, rows: Tensor, factors: Sequence[Tensor]) -> ProductInputs:
        """The low-rank changes: of each layer ``A`` and ``B``."""
        As, Bs = factors[::2], factors[1::2]
        A = torch.cat(tuple(As)) if len(As) > 1 else As[0].contiguous()
        return ProductInputs(rows, A, [B.t().contiguous() for B in Bs], self.scales)

    def outputs(self, rows: Tensor) -> list[Tensor]:
        """``x W_iᵀ + b_i``."""
        return [F.linear(rows, W, b) for W, b in zip(self.weights, self.biases, strict=True)]

    def onto(self, dx: Tensor | None, dys: Sequence[Tensor]) -> Tensor | None:
        """``dx + Σ G_i W_i`` in the memory of ``dx``, if it is wanted."""
        if dx is not None:
            for G, W in zip(dys, self.weights, strict=True):
                dx.addmm_(G, W)
        return dx


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _as_input(y: Tensor, x: Tensor) -> Tensor:
    return y.view(*x.shape[:-1], -1)


def _by_layer(dA: Tensor, dBs: Sequence[Tensor]) -> list[Tensor]:
    """The derivatives with respect to ``A`` and ``B`` of each layer in turn."""
    parts = zip(dA.split([len(dB) for dB in dBs]), dBs, strict=True)
    return [t for dA_i, dB in parts for t in (dA_i, dB.t())]


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
