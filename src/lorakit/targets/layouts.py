"""The layouts of fused projections: which output rows are q, k and v, gate and up. One row an architecture family.

A fused weight is a sequence of equal groups (one, or one for each head or each group of heads), and a group is a
sequence of parts with a size each, in some unit: ``({"q": 1, "k": 1, "v": 1}, 1)`` is three equal blocks, and the same
in as many groups as there are heads is the interleaved layout. The sizes follow from the layer's own width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from lorakit.core.target import Target, stock_class
from lorakit.core.walk import module_at
from lorakit.ops import Ranges

Parts = tuple[dict[str, int], int]


class Layout(NamedTuple):
    """One family: the class of the module that holds the fused layer, the layer's name, and its parts."""

    owners: tuple[str, ...]
    layer: str
    parts: Callable[[Any], Parts]


def _thirds(owner: Any) -> Parts:
    return {"q": 1, "k": 1, "v": 1}, 1


def _gpt2(owner: Any) -> Parts:
    return ({"k": 1, "v": 1} if owner.is_cross_attention else {"q": 1, "k": 1, "v": 1}), 1


def _bigcode(owner: Any) -> Parts:
    if owner.multi_query:
        return {"q": owner.num_heads, "k": 1, "v": 1}, 1
    return {"q": 1, "k": 1, "v": 1}, owner.num_heads


def _grouped_query(owner: Any) -> Parts:
    heads, shared = owner.config.num_attention_heads, owner.config.num_key_value_heads
    return {"q": heads, "k": shared, "v": shared}, 1


def _by_head(owner: Any) -> Parts:
    return {"q": 1, "k": 1, "v": 1}, owner.num_heads


def _neox(owner: Any) -> Parts:
    return {"q": 1, "k": 1, "v": 1}, owner.config.num_attention_heads


def _falcon(owner: Any) -> Parts:
    if owner.new_decoder_architecture:
        return {"q": owner.num_heads // owner.num_kv_heads, "k": 1, "v": 1}, owner.num_kv_heads
    if owner.multi_query:
        return {"q": owner.num_heads, "k": 1, "v": 1}, 1
    return _by_head(owner)


def _gate_up(owner: Any) -> Parts:
    return {"gate": 1, "up": 1}, 1


LAYOUTS: tuple[Layout, ...] = (
    Layout(("GPT2Attention", "DecisionTransformerGPT2Attention", "ImageGPTAttention"), "c_attn", _gpt2),
    Layout(("GPTBigCodeAttention",), "c_attn", _bigcode),
    Layout(("Phi3Attention",), "qkv_proj", _grouped_query),
    Layout(("Phi3MLP", "GlmMLP", "Glm4MLP"), "gate_up_proj", _gate_up),
    Layout(("GPTNeoXAttention",), "query_key_value", _neox),
    Layout(("BloomAttention", "PersimmonAttention"), "query_key_value", _by_head),
    Layout(("FalconAttention",), "query_key_value", _falcon),
    Layout(("MptAttention", "ModernBertAttention"), "Wqkv", _thirds),
    Layout(("MultiheadAttention",), "in_proj", _thirds),
)


def parts_of(model: nn.Module, whole: Target) -> dict[str, Ranges]:
    """The named parts of a target's output rows; empty when its layout is not known."""
    owner, layer = _place(model, whole)
    classes = {cls.__name__ for cls in stock_class(owner).__mro__}
    for layout in LAYOUTS:
        if layout.layer == layer and classes & set(layout.owners):
            return _rows(*layout.parts(owner), whole.out)
    return {}


def _place(model: nn.Module, whole: Target) -> tuple[nn.Module, str]:
    """The module that holds the fused layer, and the layer's name there."""
    if isinstance(whole.module, nn.MultiheadAttention):
        return whole.module, whole.parameter.removesuffix("_weight").removesuffix("_bias")
    path = whole.path
    if whole.parameter in ("weight", "bias") and path.endswith("." + whole.parameter):
        path = path.rpartition(".")[0]
    owner, _, layer = path.rpartition(".")
    return module_at(model, owner), layer


def _rows(sizes: dict[str, int], groups: int, out: int) -> dict[str, Ranges]:
    """The rows of each part; none when they do not add up to the layer's width."""
    unit, left = divmod(out, groups * sum(sizes.values()))
    if left:
        return {}
    group, start, found = out // groups, 0, {}
    for name, size in sizes.items():
        stop = start + size * unit
        found[name] = Ranges.of(((g * group + start, g * group + stop) for g in range(groups)), out)
        start = stop
    return found
