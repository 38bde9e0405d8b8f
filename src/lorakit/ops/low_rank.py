"""The fused low-rank product: ``y += scale * dropout(x) Aᵀ Bᵀ`` in the memory of ``y``.

A LoRA written from stock modules makes three full-size temporaries per layer (``B(Ax)``, its scaled copy, and
the sum) and, under dropout, keeps a dropped copy of ``x`` for the backward pass. Here the second product
accumulates straight into the base output (``addmm_``), and the backward pass keeps only ``x`` (which q, k
and v share) and the ``T x r`` product ``x Aᵀ``; a dropout mask is drawn again from its seed instead of being
kept.

Shapes: ``x`` ``(..., in)``, ``A`` ``(r, in)``, ``B`` ``(out, r)``, ``y`` ``(..., out)``.
Source: Hu et al. 2021 (arXiv 2106.09685), equation 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from lorakit.ops.native import load as native

# Looked up once: they are asked in every call of every layer.
_in_torch_func = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state

# Up to this many outputs the time goes into the calls and not into the work: then three plain operations win, and their
# graph keeps the same ``x`` and ``x Aᵀ``. Beyond it the full-size temporaries of that way cost more (measured on CPU).
_FEW = 2**17


def add_low_rank(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, dropout: float = 0.0
) -> Tensor:
    """Return ``y + scale * dropout(x) Aᵀ Bᵀ``, reusing the memory of ``y``.

    ``y`` must belong to the caller alone (a fresh layer output): it is changed in place wherever that is
    possible. The product is computed in the dtype of ``y``; factors of another dtype are cast (they are
    small), so a bf16 base with fp32 factors needs no fp32 copy of ``x``; but fewer rows than the rank are
    computed in the wider dtype of the factors.

    Args:
        y: Base output, ``(..., out)``.
        x: Layer input, ``(..., in)``.
        A: Down projection, ``(r, in)``.
        B: Up projection, ``(out, r)``.
        scale: The scaling times the weight of the adapter in a mix.
        dropout: Probability of dropping an entry of ``x`` on this path; 0 outside training.
    """
    # A compiler of graphs cannot look into the compiled product. What else it does not take it declines itself.
    if not dropout and not is_dynamo_compiling() and native.product is not None:
        added = native.product(y, x, A, B, scale)
        if added is not None:
            return added
    if transformed():
        h = F.linear(F.dropout(x, dropout) if dropout else x, A.to(x.dtype)).to(y.dtype)
        return torch.add(y, F.linear(h, B.to(y.dtype)), alpha=scale)
    one_dtype = x.dtype == A.dtype == B.dtype == y.dtype
    if one_dtype and not dropout and y.numel() <= _FEW and _is_flat(y):
        h = F.linear(x, A)
        if x.dim() == 2 and not torch.is_grad_enabled():  # one call less for a token of a decoder
            return y.addmm_(h, B.t(), alpha=scale)
        return y.add_(F.linear(h, B), alpha=scale)
    fewer_rows_than_rank = x.numel() < A.numel()
    if fewer_rows_than_rank and x.itemsize < A.itemsize and not dropout and _is_flat(y):
        # Then it is the rows that are cheaper to cast, and to keep. The result is rounded once.
        return y.add_(F.linear(F.linear(x.to(A.dtype), A), B.to(A.dtype)), alpha=scale)
    if A.requires_grad and torch.is_grad_enabled():  # with A frozen the operations below keep x Aᵀ and not x
        return _AddLowRank.apply(y, x, A, B, scale, dropout)
    dtype = y.dtype
    if not one_dtype:
        x, A, B = x.to(dtype), A.to(dtype), B.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    if dropout:
        rows = _Dropout.apply(rows, dropout, _draw_seed())
    return _add_product_to(y, F.linear(rows, A), B, scale)


def add_product(y: Tensor, h: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``y + scale * h Bᵀ`` in the memory of ``y``, differentiable.

    Args:
        y: Base output, ``(..., out)``, owned by the caller.
        h: ``(..., r)``.
        B: ``(out, r)``.
        scale: A plain number.
    """
    if transformed():
        return torch.add(y, F.linear(h.to(y.dtype), B.to(y.dtype)), alpha=scale)
    return _add_product_to(y, h.reshape(-1, h.shape[-1]).to(y.dtype), B.to(y.dtype), scale)


def add_lookup(
    y: Tensor, ids: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, padding: int | None = None
) -> Tensor:
    """Return ``y + scale * A[:, ids]ᵀ Bᵀ``, reusing the memory of ``y``: the change of an embedding table.

    Args:
        y: Looked-up rows, ``(..., out)``, owned by the caller.
        ids: Which columns of ``A``, ``(...)``.
        A: ``(r, vocabulary)``; fastest where its columns lie side by side in memory.
        B: ``(out, r)``.
        scale: A plain number.
        padding: The column that gets no gradient.
    """
    if not is_dynamo_compiling() and native.lookup is not None:
        added = native.lookup(y, ids, A, B, scale, -1 if padding is None else padding)
        if added is not None:
            return added
    h = F.embedding(ids, A.mT, padding_idx=padding)
    return add_product(y, h.to(y.dtype), B, scale)


def joined(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Two tensors in one, laid out in memory as the first is.

    Args:
        first: ``(*batch, m, n)``; a transposed view of a contiguous tensor stays one.
        second: The same size, but along ``dim``.
        dim: -1 or -2.
    """
    if first.is_contiguous() or not first.mT.is_contiguous():
        return torch.cat([first, second], dim)
    return torch.cat([first.mT, second.mT], -3 - dim).mT


def transformed() -> bool:
    """Whether the call is traced or transformed: then plain functional operations are wanted.

    A compiler fuses better than a hand-written autograd function; ``torch.func`` (``vmap``, ``grad``), forward-mode
    differentiation and ``torch.jit.trace`` cannot see through one, nor through a write to a tensor that is not
    theirs.
    """
    return (
        is_compiling() or _in_torch_func() or forward_ad._current_level >= 0 or _tracing_state() is not None
    )


def _add_product_to(y: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
    """``y += scale * h Bᵀ`` for two-dimensional ``h``; a new tensor where ``y`` has no flat view."""
    if _is_flat(y):
        y.view(-1, y.shape[-1]).addmm_(h, B.t(), alpha=scale)
        return y
    return y.add(torch.mm(h, B.t()).view(y.shape), alpha=scale)


def _is_flat(y: Tensor) -> bool:
    """Whether ``y`` can be seen as rows at equal distances in memory: a whole tensor, or some of its last dimension."""
    if y.is_contiguous():
        return True
    if y.dim() < 2 or y.stride(-1) != 1 or y.stride(-2) < y.shape[-1]:
        return False
    step = y.stride(-2) * y.shape[-2]
    for size, stride in zip(y.shape[-3::-1], y.stride()[-3::-1], strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _draw_seed() -> int:
    """A seed from torch's CPU generator, so that ``manual_seed`` and checkpointing govern dropout."""
    return int(torch.randint(2**62, ()).item())


def _mask(rows: Tensor, seed: int, dropout: float) -> Tensor:
    """The 0/1 mask that belongs to a seed, the same each time it is drawn."""
    generator = torch.Generator(device=rows.device).manual_seed(seed)
    return (
        torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        .bernoulli_(1 - dropout, generator=generator)
        .mul_(1 / (1 - dropout))
    )


def _drop(rows: Tensor, mask: Tensor) -> Tensor:
    return rows * mask


class _Dropout(torch.autograd.Function):
    """Dropout that keeps the seed of its mask for the backward pass, and not the mask."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dropout: float, seed: int) -> Tensor:
        ctx.dropout, ctx.seed = dropout, seed
        return _drop(rows, _mask(rows, seed, dropout))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        return _Dropout.apply(grad, ctx.dropout, ctx.seed), None, None


class _AddLowRank(torch.autograd.Function):
    """Forward in place on ``y``; saves ``x``, ``h = x Aᵀ`` and the factors.

    With ``G = dL/dy``: ``dB = s Gᵀ h``, ``dh = s G B``, ``dA = dhᵀ x``, ``dx = dh A``, ``dy = G``.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
        ctx.scale, ctx.dropout, ctx.seed = scale, dropout, _draw_seed() if dropout else None
        dtype = y.dtype
        rows = x.reshape(-1, x.shape[-1])
        if dropout:
            rows = _drop(rows, _mask(rows, ctx.seed, dropout))
        h = torch.mm(rows.to(dtype), A.to(dtype).t())
        ctx.save_for_backward(x, A, B, h)
        result = _add_product_to(y, h, B.to(dtype), scale)
        if result is y:
            ctx.mark_dirty(y)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, A, B, h = ctx.saved_tensors
        need_y, need_x, need_A, need_B = ctx.needs_input_grad[:4]
        dtype = grad.dtype
        g = grad.reshape(-1, grad.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        mask = _mask(rows, ctx.seed, ctx.dropout) if ctx.dropout else None
        # Under create_graph the backward pass is differentiated itself: h must then be a function of x and A.
        again = torch.is_grad_enabled()
        dropped = rows if mask is None or not (need_A or again) else _drop(rows, mask)
        if again:
            h = torch.mm(dropped.to(dtype), A.to(dtype).t())
        dx = dA = dB = None
        if need_B:
            dB = (torch.mm(g.t(), h) * ctx.scale).to(B.dtype)
        if need_x or need_A:
            dh = torch.mm(g, B.to(dtype)) * ctx.scale
            if need_A:
                dA = torch.mm(dh.t(), dropped.to(dtype)).to(A.dtype)
            if need_x:
                dx = torch.mm(dh, A.to(dtype))
                dx = (dx if mask is None else _drop(dx, mask.to(dtype))).to(x.dtype).view(x.shape)
        return (grad if need_y else None), dx, dA, dB, None, None
