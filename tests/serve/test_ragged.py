"""The packed attention is attention, of each request on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorakit.errors import ModelError
from lorakit.serve.kv import KVArena
from lorakit.serve.ragged import AttentionCall, ragged_attention, ragged_step
from lorakit.serve.runner import Piece


class Layer(nn.Module):
    layer_idx = 0


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cap: float | None) -> Tensor:
    """Attention of one text ``(heads, n, width)`` by the formula, one token at a time."""
    group = q.shape[0] // k.shape[0]
    out = torch.empty(q.shape)
    for head in range(q.shape[0]):
        for i in range(q.shape[1]):
            first = 0 if window is None else max(0, i + 1 - window)
            scores = k[head // group, first : i + 1] @ q[head, i] * scale
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            out[head, i] = scores.softmax(0) @ v[head // group, first : i + 1]
    return out


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    window=st.sampled_from([None, 1, 3, 7]),
    cap=st.sampled_from([None, 2.0]),
    scale=st.sampled_from([None, 0.3]),
)
def test_chunks_of_many_texts_give_what_each_text_gives_alone(
    cuts: list[list[int]], heads: tuple[int, int], window: int | None, cap: float | None, scale: float | None
) -> None:
    torch.manual_seed(0)
    (many, few), width = heads, 8
    arena = KVArena(1, few, width, 64 * len(cuts))
    texts = [
        (torch.randn(many, sum(c), width), torch.randn(few, sum(c), width), torch.randn(few, sum(c), width))
        for c in cuts
    ]
    slabs = [arena.reserve(sum(c)) for c in cuts]
    found: list[list[Tensor]] = [[] for _ in cuts]
    for step in range(4):
        rows: list[tuple[Tensor, ...]] = []
        pieces, who, at = [], [], 0
        for i, chunks in enumerate(cuts):
            if step < len(chunks):
                past, n = sum(chunks[:step]), chunks[step]
                rows.append(tuple(t[:, past : past + n] for t in texts[i]))
                pieces.append(Piece(at, at + n, past, slabs[i]))
                who.append(i)
                at += n
        if not rows:
            break
        q, k, v = (torch.cat(parts, 1)[None] for parts in zip(*rows, strict=True))
        with ragged_step(pieces):
            out, weights = ragged_attention(
                Layer(), q, k, v, None, scaling=scale, sliding_window=window, softcap=cap
            )
        assert weights is None
        for i, piece in zip(who, pieces, strict=True):
            found[i].append(out[0, piece.start : piece.end].transpose(0, 1))
    for (q, k, v), parts in zip(texts, found, strict=True):
        want = plain(q, k, v, scale or width**-0.5, window, cap)
        torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-5)


def call(**others: Any) -> None:
    x = torch.randn(1, 2, 1, 4)
    with ragged_step(()):
        ragged_attention(Layer(), x, x, x, others.pop("attention_mask", None), **others)


@pytest.mark.parametrize(
    "others", [{"s_aux": torch.ones(2)}, {"is_causal": False}, {"attention_mask": torch.ones(1)}]
)
def test_what_it_does_not_compute_is_refused_by_name(others: dict[str, Any]) -> None:
    name = "a mask" if "attention_mask" in others else next(iter(others))
    with pytest.raises(ModelError, match=name):
        call(**others)


def test_what_has_no_effect_passes() -> None:
    call(position_ids=torch.zeros(1), dropout=0.0, is_causal=True, s_aux=None)


def test_calls_are_noted() -> None:
    seen: list[AttentionCall] = []
    x = torch.randn(1, 2, 3, 4)
    with ragged_step((), seen):
        out, _ = ragged_attention(Layer(), x, x, x, None, sliding_window=5)
    assert seen == [AttentionCall(0, 2, 4, 4, 5)]
    assert not out.any()
