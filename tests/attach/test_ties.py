"""A tied model whose ends are changed differently: merged, saved, loaded again, it computes what it computed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lorakit as lk
from lorakit.errors import MergeError
from lorakit.models.streaming_merge import merge_checkpoint

IDS = torch.tensor([[5, 6, 7, 8, 9]])
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


def bert() -> Any:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=32,
        )
    )  # fmt: skip


def t5() -> Any:
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes))


def bart() -> Any:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=16, **heads, **layers))


MODELS = {
    "llama": (llama, AutoModelForCausalLM, {"input_ids": IDS}),
    "bert": (bert, AutoModelForMaskedLM, {"input_ids": IDS}),
    "t5": (t5, AutoModelForSeq2SeqLM, BOTH),
    "bart": (bart, AutoModelForSeq2SeqLM, BOTH),
}


def adapted(name: str, adapter: Any, targets: list[str] | None, folder: Path) -> tuple[Any, Any]:
    """A base that is saved and loaded, with a random adapter that is saved; and what it computes."""
    make, auto, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder / "base")
    model = auto.from_pretrained(folder / "base")
    lk.attach(model, adapter, targets, seed=0)
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        lk.save(model, folder / "adapter")
        return model, model(**inputs).logits


def computed(name: str, folder: Path) -> torch.Tensor:
    _, auto, inputs = MODELS[name]
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return model(**inputs).logits


CASES: list[tuple[str, Any, list[str] | None]] = [
    ("llama", lk.LoRA(r=2), ["embed_tokens", "lm_head"]),
    ("llama", {"embed_tokens": lk.TokenRows((5,)), "lm_head": lk.DoRA(lk.LoRA(r=2))}, None),
    ("llama", lk.LoRA(r=2), ["lm_head"]),
    ("bert", lk.LoRA(r=2), ["word_embeddings", "decoder"]),
    ("bert", lk.LoRA(r=2), ["decoder"]),
    ("bert", lk.LoRA(r=2, bias=True), ["decoder"]),
    ("t5", lk.LoRA(r=2), ["lm_head"]),
    ("t5", lk.LoRA(r=2), ["encoder.embed_tokens"]),
    ("bart", lk.LoRA(r=2), ["lm_head"]),
    ("bart", lk.LoRA(r=2), ["shared"]),
    ("bart", lk.LoRA(r=2), ["encoder.embed_tokens", "lm_head"]),
]


@pytest.mark.parametrize(("name", "adapter", "targets"), CASES, ids=str)
def test_a_saved_model_computes_what_the_merged_one_did(
    tmp_path: Path, name: str, adapter: Any, targets: list[str] | None
) -> None:
    model, logits = adapted(name, adapter, targets, tmp_path)
    lk.merge(model, permanent=True)
    assert model.config.tie_word_embeddings is False
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "merged")
    assert torch.allclose(computed(name, tmp_path / "merged"), logits, atol=1e-5)


@pytest.mark.parametrize(("name", "adapter", "targets"), CASES, ids=str)
def test_merging_from_the_disk_gives_the_same_or_says_why_not(
    tmp_path: Path, name: str, adapter: Any, targets: list[str] | None
) -> None:
    _, logits = adapted(name, adapter, targets, tmp_path)
    if name in ("t5", "bart") or getattr(adapter, "bias", False):
        with pytest.raises(MergeError, match="are one tensor"):
            merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
        return
    assert merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged").untied
    assert torch.allclose(computed(name, tmp_path / "merged"), logits, atol=1e-5)


@pytest.mark.parametrize(("name", "adapter", "targets"), CASES, ids=str)
def test_unmerging_ties_again(tmp_path: Path, name: str, adapter: Any, targets: list[str] | None) -> None:
    model, _ = adapted(name, adapter, targets, tmp_path)
    before = {key: id(value) for key, value in model.named_parameters(remove_duplicate=False)}
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    lk.merge(model)
    twin = copy.deepcopy(model)
    lk.unmerge(model)
    assert {key: id(value) for key, value in model.named_parameters(remove_duplicate=False)} == before
    lk.unmerge(twin)
    for one in (model, twin):
        assert one.config.tie_word_embeddings is True
        assert len({id(p) for p in one.parameters()}) == len(set(before.values()))
        assert all(torch.equal(value, bits[key]) for key, value in one.state_dict().items())


def test_what_both_ends_share_leaves_the_tie(tmp_path: Path) -> None:
    model, logits = adapted("llama", lk.TokenRows((5, 7)), ["embed_tokens"], tmp_path)
    lk.merge(model, permanent=True)
    assert model.config.tie_word_embeddings is True
    model.save_pretrained(tmp_path / "merged")
    assert torch.allclose(computed("llama", tmp_path / "merged"), logits, atol=1e-5)
