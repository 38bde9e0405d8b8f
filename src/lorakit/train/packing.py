"""Attention for packed batches: several documents end to end in one row, each attending to itself alone.

A block mask over the packed row would cost time and memory in the square of the row's length, most of it for pairs
that are masked out. Here the attention runs document by document: the same kernel on the same numbers as if each
document stood alone. It is registered with transformers' ``AttentionInterface`` under the name ``lorakit_packed``;
the documents come as ``cu_seq_lens_q``, the name that transformers' variable-length kernels use too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.train.for_a_while import in_eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lorakit_packed"


def pack(documents: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Model inputs for documents laid end to end: each ``(1, T)``, and the borders ``(n + 1,)``.

    ``position_ids`` restart with every document, and there is no attention mask: a mask of ones would switch off the
    recognition of packed rows in transformers.
    """
    lengths = torch.tensor([len(document) for document in documents])
    borders = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return {
        "input_ids": torch.tensor([token for document in documents for token in document])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
    }


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document; the signature is transformers'.

    Args:
        module: The attention layer.
        query: ``(1, heads, T, d)``.
        key: ``(1, kv_heads, T, d)``.
        value: ``(1, kv_heads, T, d)``.
        attention_mask: Must be None.
        scaling: Of the scores.
        dropout: Of the probabilities.
        sliding_window: How many tokens back a token sees, where the layer limits it.
        cu_seq_lens_q: Borders of the documents, ``(n + 1,)``.
        kwargs: What else transformers hands to every attention; of no meaning here.

    Returns:
        ``(1, T, heads, d)`` and no probabilities.
    """
    if cu_seq_lens_q is None or attention_mask is not None:
        raise ValueError("lorakit's packed attention was reached by a batch that is not packed.")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("lorakit's packed attention has no soft cap and no attention sinks.")
    lengths = cu_seq_lens_q.diff().tolist()
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # Splitting has one backward for all pieces; slicing would add up a full-size gradient for each of them.
    documents = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    pieces = []
    for q, k, v in documents:
        window = _window_mask(q.shape[2], sliding_window, q.device)
        pieces.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=window, dropout_p=dropout, is_causal=window is None, scale=scaling
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    if window is None or length <= window:
        return None
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (back >= 0) & (back < window)


@contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """Run a model's attention document by document inside a ``with`` block; other batches must stay outside.

    Backward belongs inside too: activation checkpointing runs the layers again then.
    """
    from transformers import AttentionInterface

    if model.config._attn_implementation == NAME:  # inside another such block: the walk below takes its time
        yield
        return
    AttentionInterface.register(NAME, packed_attention)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def packing_error(model: PreTrainedModel) -> str | None:
    """Why a model cannot be trained on packed rows, or None when it can: found out by trying.

    Two short documents are run packed and apart. An architecture that mixes tokens otherwise than by attention (state
    spaces, convolutions), makes positions itself, or does not go through transformers' attention interface, differs.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (7, 5, 9)]
    device = model.get_input_embeddings().weight.device
    try:
        with in_eval_mode(model), torch.no_grad():
            apart = [
                model(input_ids=torch.tensor([d], device=device), use_cache=False).logits[0]
                for d in documents
            ]
            batch = {name: tensor.to(device) for name, tensor in pack(documents).items()}
            with packed(model):
                together = model(**batch, use_cache=False).logits[0]
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        return f"{type(model).__name__} does not run on a packed row ({str(error).splitlines()[0][:120]})"
    expected = torch.cat(apart)
    difference = (together - expected).abs().max().item()
    spread = expected.abs().max().item()
    tolerance = 1e-4 if expected.dtype == torch.float32 else 0.05
    if difference > tolerance * max(spread, 1.0):
        name = type(model).__name__
        return f"{name} gives other outputs for packed documents than for separate ones (by {difference:.1e})"
    return None
