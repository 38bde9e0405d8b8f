"""Attention for one packed row: every request attends to its own keys and values, which live in its slab.

It is registered with transformers as an attention implementation, so the layers of any model that lets its attention
be chosen run it, unchanged. Which rows belong to which request is told per call, by a context variable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lorakit.errors import ModelError
from lorakit.serve.runner import Piece

NAME = "lorakit_ragged"
"""What the implementation is called in transformers."""

# Arguments that layers pass on to their attention. None of these changes what is computed here.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position", "dropout", "layer_idx", "logits_to_keep", "output_attentions",
        "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings", "position_ids",
        "return_dict", "use_cache",
    }
)  # fmt: skip


class AttentionCall(NamedTuple):
    """The facts of one attention of a model, as it was called.

    Attributes:
        layer: Its number.
        kv_heads: Heads of keys and values.
        key_width: Width of a key.
        value_width: Width of a value.
        window: Its sliding window; None is none.
    """

    layer: int
    kv_heads: int
    key_width: int
    value_width: int
    window: int | None


class _Step(NamedTuple):
    pieces: Sequence[Piece]
    seen: list[AttentionCall] | None
    masks: dict[tuple[int, int, int | None, torch.device], Tensor | None]  # the same ones in most layers


_STEP: ContextVar[_Step] = ContextVar("lorakit_ragged_step")


@contextmanager
def ragged_step(pieces: Sequence[Piece], seen: list[AttentionCall] | None = None) -> Iterator[None]:
    """Say which rows belong to which request, for the calls of the model inside the block.

    Args:
        pieces: The rows of each request; rows of none attend to nothing.
        seen: Where every attention that is called is noted; None notes nothing.
    """
    token = _STEP.set(_Step(pieces, seen, {}))
    try:
        yield
    finally:
        _STEP.reset(token)


def register() -> None:
    """Make the implementation known to transformers; a second time does nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, ragged_attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Requests are kept apart by the slabs; a mask over the whole row is never made."""


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Write keys and values of all rows to the slabs, and attend, request by request.

    Args:
        module: The attention; its ``layer_idx`` says which part of the slabs is its own.
        query: ``(1, heads, T, head_dim)``.
        key: ``(1, kv_heads, T, head_dim)``.
        value: The same.
        attention_mask: None: causality follows from the pieces.
        scaling: Factor on the scores; None is ``head_dim ** -0.5``.
        sliding_window: A token sees itself and so many less one before it; None sees all.
        softcap: Scores ``s`` become ``softcap * tanh(s / softcap)``.
        others: What else the layer passes on.

    Returns:
        ``(1, T, heads, head_dim)``, and no weights.

    Raises:
        ModelError: The layer asks for something that is not computed here.
    """
    odd = {name for name, given in others.items() if given is not None} - _WITHOUT_EFFECT
    if others.get("is_causal"):
        odd.discard("is_causal")
    if odd or attention_mask is not None:
        names = ", ".join(sorted(odd or {"a mask of its own"}))
        raise ModelError(
            f"{type(module).__name__} gives its attention {names}, which the packed attention of lorakit.serve does "
            "not compute. This model cannot be served."
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    _, heads, rows, width = query.shape
    kv_heads = key.shape[1]
    step = _STEP.get()
    if step.seen is not None:
        step.seen.append(AttentionCall(layer, kv_heads, width, value.shape[3], sliding_window))
    out = (query.new_empty if step.pieces else query.new_zeros)(1, rows, heads, value.shape[3])
    for start, end, past, slab in step.pieces:
        n, total = end - start, past + end - start
        keys, values = slab.keys(layer, total), slab.values(layer, total)
        keys[:, past:] = key[0, :, start:end]
        values[:, past:] = value[0, :, start:end]
        first = 0 if sliding_window is None else max(0, past + 1 - sliding_window)
        if first:  # nobody in this piece sees what is before
            keys, values = keys[:, first:], values[:, first:]
        facts = (n, past - first, sliding_window, query.device)
        if facts not in step.masks:
            step.masks[facts] = _causal(*facts)
        mask = step.masks[facts]
        # Heads that share keys are laid side by side, so keys are never repeated.
        own = query[0, :, start:end].reshape(kv_heads, heads // kv_heads, n, width)
        if softcap is not None:
            seen = _capped(own, keys, values, mask, scaling, softcap)
        elif n == 1:
            seen = scaled_dot_product_attention(own[None, :, :, 0], keys[None], values[None], scale=scaling)[
                0
            ]
        else:
            seen = scaled_dot_product_attention(
                own.reshape(1, heads, n, width), keys[None], values[None], mask,
                scale=scaling, enable_gqa=heads != kv_heads,
            )  # fmt: skip
        out[0, start:end] = seen.reshape(heads, n, width).transpose(0, 1)
    return out, None


def _causal(n: int, past: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys each of ``n`` tokens after ``past`` sees, ``(n, past + n)``; None where one token sees all."""
    if n == 1:
        return None
    mask = torch.ones(n, past + n, dtype=torch.bool, device=device).tril(past)
    return mask if window is None else mask.triu(past + 1 - window)


def _capped(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None, softcap: float
) -> Tensor:
    """Attention with capped scores: ``query`` ``(kv_heads, group, n, width)``, keys ``(kv_heads, total, width)``."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ keys.unsqueeze(1).mT * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values.unsqueeze(1)
