"""What the layers of well-known transformers are called, where a method needs to know one from another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lorakit.core.selection import pattern_matches


class LayerNames(NamedTuple):
    """Names in one architecture, each a regular expression for the end of a path (see `pattern_matches`).

    Attributes:
        keys_values: The layers that make attention keys and values; where queries, keys and values are one layer, that.
        feedforward_down: The layer that leads from the wide inside of the feed-forward block back to the model's width.
    """

    keys_values: tuple[str, ...]
    feedforward_down: tuple[str, ...]


_BERT = LayerNames(("key", "value"), (r"layer\.\d+\.output\.dense",))  # not attention.output.dense
_T5 = LayerNames((r"(SelfAttention|EncDecAttention)\.[kv]",), (r"DenseReluDense\.wo",))
_BART = LayerNames(("k_proj", "v_proj"), ("fc2",))
_LLAMA = LayerNames(("k_proj", "v_proj"), ("down_proj",))
_GPT2 = LayerNames(("c_attn",), (r"mlp\.c_proj",))
_NEOX = LayerNames(("query_key_value",), ("dense_4h_to_h",))

LAYER_NAMES: Mapping[str, LayerNames] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "albert": LayerNames(("key", "value"), ("ffn_output",)),
    "deberta": LayerNames(("in_proj",), _BERT.feedforward_down),
    "deberta-v2": LayerNames(("key_proj", "value_proj"), _BERT.feedforward_down),
    "distilbert": LayerNames(("k_lin", "v_lin"), (r"ffn\.lin2",)),
    "modernbert": LayerNames(("Wqkv",), (r"mlp\.Wo",)),
    "mpnet": LayerNames((r"attn\.[kv]",), _BERT.feedforward_down),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("bart", "mbart", "pegasus", "opt", "phi", "whisper"), _BART),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT2),
    "gptj": LayerNames(("k_proj", "v_proj"), ("fc_out",)),
    **dict.fromkeys(("gpt_neo", "starcoder2"), LayerNames(("k_proj", "v_proj"), _GPT2.feedforward_down)),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), _NEOX),
    **dict.fromkeys(
        (
            "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "granite",
            "cohere", "stablelm",
        ),
        _LLAMA,
    ),
    "phi3": LayerNames(("qkv_proj",), _LLAMA.feedforward_down),
}  # fmt: skip
"""By ``config.model_type`` of transformers."""

_FEEDFORWARD_DOWN = tuple(dict.fromkeys(n for names in LAYER_NAMES.values() for n in names.feedforward_down))


def is_feedforward_down(path: str) -> bool:
    """Whether a layer's name is that of the way back out of a feed-forward block, in any of the architectures."""
    return any(pattern_matches(name, path) for name in _FEEDFORWARD_DOWN)
