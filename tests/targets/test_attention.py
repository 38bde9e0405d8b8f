"""Attentions: which are found, with what facts, and why others are not."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

import lorakit as lk
from lorakit.errors import UnsupportedTargetError
from lorakit.targets.attention import AttentionTarget, attention_target, attentions, learned_positions
from tests.attach.architectures import llama, t5
from tests.attach.readers import SIZES, reader


@pytest.mark.parametrize(
    ("name", "path", "heads", "positions"),
    [
        ("llama", "model.layers.1.self_attn", 2, None),
        ("mistral", "model.layers.1.self_attn", 2, None),
        ("gpt2", "transformer.h.1.attn", 2, 32),
        ("bert", "bert.encoder.layer.1.attention.self", 4, 64),
        ("roberta", "roberta.encoder.layer.1.attention.self", 4, 64),
    ],
)
def test_the_attentions_of_a_model(name: str, path: str, heads: int, positions: int | None) -> None:
    model = reader(name)
    found = attentions(model)
    assert len(found) == 2
    target = found[path]
    assert isinstance(target, AttentionTarget)
    assert target.heads == heads
    assert target.backbone is model.base_model
    assert target.shape.in_ == 16
    assert learned_positions(target.backbone) == positions
    assert [t.path for t in lk.find(model, "all-attention", adapts="attention")] == list(found)
    at = attention_target(model, path)
    assert isinstance(at, AttentionTarget)
    assert at.shape == target.shape
    assert attention_target(model, path.rpartition(".")[0]) is None


def test_a_width_of_its_own_is_read_from_the_projection() -> None:
    """Qwen3 has heads wider than the hidden width divided by their number."""
    config = hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=6)
    target = attentions(hf.Qwen3Model(config))["layers.0.self_attn"]
    assert isinstance(target, AttentionTarget)
    assert (target.shape.out, target.heads, target.head_width) == (12, 2, 6)


def reasons(model: nn.Module) -> set[str]:
    return {reason for reason in attentions(model).values() if isinstance(reason, str)}


def test_why_others_are_not() -> None:
    assert reasons(nn.Linear(2, 2)) == set()
    assert all("no cache" in reason or "bias" in reason for reason in reasons(t5()))
    bloom = hf.BloomModel(hf.BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2))
    assert any("bias for each pair" in reason for reason in reasons(bloom))
    bart = hf.BartModel(hf.BartConfig(vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1))
    assert any("encoder-decoder" in reason for reason in reasons(bart))
    deep = hf.DeepseekV3Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, first_k_dense_replace=1,
        intermediate_size=8, q_lora_rank=None, kv_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
    )  # fmt: skip
    assert all("compressed" in reason for reason in reasons(hf.DeepseekV3Model(deep)))
    layer = nn.TransformerEncoderLayer(8, 2)
    assert any("nn.MultiheadAttention" in reason for reason in reasons(layer))
    distil = hf.DistilBertModel(hf.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=8))
    with pytest.raises(UnsupportedTargetError, match="takes no cache"):
        lk.attach(distil, lk.PrefixTuning())


def test_it_is_no_weight() -> None:
    target = attentions(llama())["model.layers.0.self_attn"]
    assert isinstance(target, AttentionTarget)
    for ask in (
        target.weight,
        lambda: target.to_matrix(torch.ones(1)),
        lambda: target.from_matrix(torch.ones(1)),
        lambda: target.apply(torch.ones(1), torch.ones(1)),
    ):
        with pytest.raises(UnsupportedTargetError, match="not one weight"):
            ask()
    assert target.bias is None
    assert target.stored.device.type == "cpu"
