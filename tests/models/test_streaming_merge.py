"""Merging into a checkpoint without its model: the bits of a merge in memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lorakit as lk
from lorakit.errors import AdapterMismatchError, ConfigError, MergeError, ModelError
from lorakit.io.checkpoint import Checkpoint
from lorakit.models.streaming_merge import merge_checkpoint
from tests.tiny_chat import tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def llama(**changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32))


def bert() -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=32,
        )
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "llama": (llama, AutoModelForCausalLM),
    "gpt2": (gpt2, AutoModelForCausalLM),
    "bert": (bert, AutoModelForMaskedLM),
}


def base_in(folder: Path, make: Callable[[], nn.Module], dtype: torch.dtype, **options: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.to(dtype).save_pretrained(folder, **options)
    return folder


def adapter_in(
    folder: Path,
    base: Path,
    auto: Any,
    adapter: Any,
    targets: Any = None,
    *,
    seed: int = 1,
    size: float = 0.1,
) -> Path:
    """A random adapter of a base, as training would save it."""
    model = auto.from_pretrained(base, dtype=torch.float32)
    lk.attach(model, adapter, targets, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return lk.save(model, folder)


def merged_in_memory(
    base: Path, auto: Any, adapters: dict[Path, float], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    model = auto.from_pretrained(base, dtype=dtype)
    for i, path in enumerate(adapters):
        lk.load(model, path, name=f"a{i}")
    lk.merge(model, {f"a{i}": weight for i, weight in enumerate(adapters.values())}, permanent=True)
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(folder: Path, auto: Any, expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


METHODS = {
    "lora": lk.LoRA(r=4),
    "rslora": lk.LoRA(r=3, alpha=5, scaling="rslora"),
    "pissa": lk.LoRA(r=2, init="pissa"),
    "dora": lk.DoRA(lk.LoRA(r=4)),
    "ia3": lk.IA3(),
    "loha": lk.LoHa(r=2),
    "lokr": lk.LoKr(r=2),
    "vera": lk.VeRA(r=8),
    "adalora": lk.AdaLoRA(init_r=4, target_r=2),
    "full": lk.FullFineTuning(),
    "bitfit": lk.BitFit(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_every_method_gives_the_bits_of_a_merge_in_memory(
    tmp_path: Path, name: str, method: str, dtype: torch.dtype
) -> None:
    make, auto = MODELS[name]
    if method == "bitfit" and name == "llama":
        make = lambda: llama(attention_bias=True, mlp_bias=True)  # noqa: E731
    base = base_in(tmp_path / "base", make, dtype)
    # BERT's head has a bias that transformers ties to another; see the test of ties.
    targets = r".*encoder.*(weight|bias)" if name == "bert" and method == "full" else None
    targets = r".*encoder.*bias" if name == "bert" and method == "bitfit" else targets
    adapter = adapter_in(tmp_path / "adapter", base, auto, METHODS[method], targets)
    expected = merged_in_memory(base, auto, {adapter: 1.0}, dtype)
    result = merge_checkpoint(base, [adapter], tmp_path / "out")
    assert_same_bits(tmp_path / "out", auto, expected, dtype)
    assert result.changed
    # A copy of all parameters is one of the embedding too, and not of the head that is tied to it.
    assert result.untied == (method == "full" and name == "gpt2")
    assert len(set(Checkpoint(tmp_path / "out")) - set(Checkpoint(base))) == int(result.untied)
    assert set(Checkpoint(base)) <= set(Checkpoint(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "adapter", "targets"),
    [
        ("gpt2", lk.LoRA(r=2), ["c_attn[q]", "c_attn[v]"]),
        ("gpt2", lk.DoRA(lk.LoRA(r=2)), ["c_attn[k]", "c_fc"]),
        ("llama", lk.LoRA(r=2), ["embed_tokens", "q_proj"]),
        ("llama", lk.LoRA(r=2), ["lm_head"]),
        ("llama", lk.DoRA(lk.LoRA(r=2)), ["embed_tokens"]),
        (
            "llama",
            {"all-linear": lk.LoRA(r=2), "embed_tokens": lk.TokenRows((3, 5)), "norm": lk.FullFineTuning()},
            None,
        ),
        ("gpt2", lk.LoRA(r=2, bias=True), ["c_fc"]),
        ("gpt2", lk.LoKr(r=2), ["c_attn[q]", "c_fc"]),
        ("gpt2", lk.DoRA(lk.LoKr(r=2)), ["c_attn[0:8,16:24,32:40]", "c_attn[8:16,50:53]"]),
        ("gpt2", lk.InputDoRA(lk.LoRA(r=2)), ["c_attn[q]", "c_attn[v]", "c_fc"]),
        ("llama", lk.InputDoRA(lk.LoKr(r=2)), ["lm_head", "q_proj"]),
        ("llama", lk.TokenRows((3, 250)), ["lm_head"]),
        ("bert", lk.LoRA(r=2), ["word_embeddings", "query"]),
        ("bert", {"query": lk.LoRA(r=2, bias=True), "query.bias": lk.BitFit()}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("blocks", [64, 2**20], ids=["blocks", "whole"])
def test_every_kind_of_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, adapter: Any, targets: Any, blocks: int
) -> None:
    monkeypatch.setattr(sys.modules["lorakit.attach.fold"], "BLOCK_NUMBERS", blocks)
    make, auto = MODELS[name]
    base = base_in(tmp_path / "base", make, torch.bfloat16)
    saved = adapter_in(tmp_path / "adapter", base, auto, adapter, targets)
    expected = merged_in_memory(base, auto, {saved: 0.7}, torch.bfloat16)
    merge_checkpoint(base, [saved], tmp_path / "out", weights=[0.7])
    assert_same_bits(tmp_path / "out", auto, expected, torch.bfloat16)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("adapter", "targets"),
    [
        (lk.LoRA(r=2), ["embed_tokens"]),
        (lk.LoRA(r=2), ["lm_head"]),
        (lk.LoRA(r=2), ["lm_head", "embed_tokens"]),
        (lk.LoRA(r=2), ["q_proj"]),
        (lk.TokenRows((1, 4)), ["embed_tokens"]),
    ],
    ids=str,
)
def test_tied_weights(tmp_path: Path, adapter: Any, targets: list[str], tied: bool) -> None:
    base = base_in(tmp_path / "base", lambda: llama(tie_word_embeddings=tied), torch.float32)
    saved = adapter_in(tmp_path / "adapter", base, AutoModelForCausalLM, adapter, targets)
    model = AutoModelForCausalLM.from_pretrained(base)
    lk.load(model, saved)
    with torch.no_grad():
        computed = model(IDS).logits
    expected = merged_in_memory(base, AutoModelForCausalLM, {saved: 1.0}, torch.float32)
    result = merge_checkpoint(base, [saved], tmp_path / "out")
    assert_same_bits(tmp_path / "out", AutoModelForCausalLM, expected, torch.float32)
    split = tied and isinstance(adapter, lk.LoRA) and targets != ["q_proj"]
    assert result.untied == split
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == (
        tied and not split
    )
    assert ("lm_head.weight" in Checkpoint(tmp_path / "out")) == (split or not tied)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
    assert torch.allclose(again, computed, atol=1e-4)


def test_a_tie_that_no_config_can_undo_is_refused(tmp_path: Path) -> None:
    def t5() -> nn.Module:
        return T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )

    base = base_in(tmp_path / "base", t5, torch.float32)
    from transformers import AutoModelForSeq2SeqLM

    saved = adapter_in(tmp_path / "a", base, AutoModelForSeq2SeqLM, lk.LoRA(r=2), ["encoder.embed_tokens"])
    with pytest.raises(MergeError, match="are one tensor"):
        merge_checkpoint(base, [saved], tmp_path / "out")
    other = base_in(tmp_path / "bert", bert, torch.float32)
    biases = adapter_in(tmp_path / "c", other, AutoModelForMaskedLM, lk.BitFit())
    with pytest.raises(MergeError, match=r"cls.predictions.bias, .*are one tensor"):
        merge_checkpoint(other, [biases], tmp_path / "out")
    linear = adapter_in(tmp_path / "b", base, AutoModelForSeq2SeqLM, lk.LoRA(r=2), ["q", "v"])
    expected = merged_in_memory(base, AutoModelForSeq2SeqLM, {linear: 1.0}, torch.float32)
    merge_checkpoint(base, [linear], tmp_path / "out")
    assert_same_bits(tmp_path / "out", AutoModelForSeq2SeqLM, expected, torch.float32)


def test_several_adapters_over_several_shards(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", llama, torch.bfloat16, max_shard_size="20kB")
    tiny_tokenizer().save_pretrained(base)
    (base / "LICENSE").write_text("mine", encoding="utf-8")
    (base / "pytorch_model.bin.index.json").write_text("{}", encoding="utf-8")
    one = adapter_in(tmp_path / "one", base, AutoModelForCausalLM, lk.LoRA(r=2), seed=1)
    two = adapter_in(
        tmp_path / "two", base, AutoModelForCausalLM, lk.DoRA(lk.LoRA(r=3)), ["q_proj", "up_proj"], seed=2
    )
    expected = merged_in_memory(base, AutoModelForCausalLM, {one: 0.7, two: -0.3}, torch.bfloat16)
    result = merge_checkpoint(base, [one, two], tmp_path / "out", weights=[0.7, -0.3])
    assert_same_bits(tmp_path / "out", AutoModelForCausalLM, expected, torch.bfloat16)
    files = {path.name for path in base.glob("*.safetensors*")}
    assert len(files) > 3
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors*")} == files
    index = [json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, tmp_path / "out")]
    assert index[0]["weight_map"] == index[1]["weight_map"]
    assert result.bytes == index[0]["metadata"]["total_size"] == index[1]["metadata"]["total_size"]
    assert len(result.changed) + result.copied == len(index[0]["weight_map"])
    assert (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "out" / "pytorch_model.bin.index.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "one", "out", "two"]


def test_a_checkpoint_without_or_with_the_prefix_of_its_base_model(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", gpt2, torch.float32)
    saved = adapter_in(tmp_path / "adapter", base, AutoModelForCausalLM, lk.LoRA(r=2), ["c_attn", "wte"])
    expected = merged_in_memory(base, AutoModelForCausalLM, {saved: 1.0}, torch.float32)
    weights = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): value for name, value in weights.items()}
    save_file(short, base / "model.safetensors", {"format": "pt"})  # as OpenAI's own files are
    merge_checkpoint(base, [saved], tmp_path / "out")
    assert_same_bits(tmp_path / "out", AutoModelForCausalLM, expected, torch.float32)
    assert set(short) < set(load_file(tmp_path / "out" / "model.safetensors"))


def test_old_names_of_layer_norms(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", bert, torch.float32)
    saved = adapter_in(
        tmp_path / "a", base, AutoModelForMaskedLM, lk.FullFineTuning(), ["attention.output.LayerNorm"]
    )
    expected = merged_in_memory(base, AutoModelForMaskedLM, {saved: 1.0}, torch.float32)
    weights = load_file(base / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for n, v in weights.items()
    }
    save_file(old, base / "model.safetensors", {"format": "pt"})
    merge_checkpoint(base, [saved], tmp_path / "out")
    assert_same_bits(tmp_path / "out", AutoModelForMaskedLM, expected, torch.float32)


@pytest.mark.parametrize("wanted", ["float32", "float16"])
def test_another_dtype_is_rounded_once(tmp_path: Path, wanted: str) -> None:
    dtype = getattr(torch, wanted)
    base = base_in(tmp_path / "base", llama, torch.bfloat16)
    saved = adapter_in(tmp_path / "adapter", base, AutoModelForCausalLM, lk.LoRA(r=2))
    merge_checkpoint(base, [saved], tmp_path / "out", dtype=wanted)
    wide = merged_in_memory(base, AutoModelForCausalLM, {saved: 1.0}, torch.float32)
    assert_same_bits(
        tmp_path / "out", AutoModelForCausalLM, {name: value.to(dtype) for name, value in wide.items()}, dtype
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == wanted


def test_the_report_is_the_error_against_float64(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", llama, torch.bfloat16)
    saved = adapter_in(tmp_path / "adapter", base, AutoModelForCausalLM, lk.LoRA(r=2), ["q_proj"], size=0.02)
    result = merge_checkpoint(base, [saved], tmp_path / "out")
    state, old, new = lk.read(saved), Checkpoint(base), Checkpoint(tmp_path / "out")
    assert len(result.changed) == len(state.tensors) == 2
    squares = [0.0, 0.0]
    for path, group in state.tensors.items():
        name = f"{path}.weight"
        delta = 8.0 * group["lora_B"].double() @ group["lora_A"].double()  # alpha 16 / r 2
        lost = new[name].double() - (old[name].double() + delta)
        found = result.changed[name]
        assert found.change == pytest.approx(float(delta.norm()), rel=1e-9)
        assert found.error == pytest.approx(float(lost.norm()), rel=1e-9)
        assert found.largest == pytest.approx(float(lost.abs().max()), rel=1e-9)
        # Half a unit in the last place of bf16, 2^-9, relative to the weight.
        assert 0 < found.largest <= float((old[name].double() + delta).abs().max()) * 2**-8
        squares[0] += found.change**2
        squares[1] += found.error**2
    assert result.error == pytest.approx((squares[1] / squares[0]) ** 0.5)
    quick = merge_checkpoint(base, [saved], tmp_path / "quick", measure=False)
    assert (quick.error, quick.worst, set(quick.changed.values())) == (None, None, {None})
    assert quick.changed.keys() == result.changed.keys()
    for name, value in Checkpoint(tmp_path / "quick").items():
        assert torch.equal(value, new[name])
    worst = max(result.changed, key=lambda n: result.changed[n].error / result.changed[n].change)
    assert result.worst == (worst, result.changed[worst].error / result.changed[worst].change)


def test_a_gguf_base_gives_what_its_converted_folder_gives(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.models.gguf_import import convert_gguf

    base = tmp_path / "base"
    base.mkdir()
    convert_gguf(tiny_gguf, base)
    saved = adapter_in(tmp_path / "adapter", base, AutoModelForCausalLM, lk.LoRA(r=2))
    expected = merged_in_memory(base, AutoModelForCausalLM, {saved: 1.0}, torch.float32)
    merge_checkpoint(tiny_gguf, [saved], tmp_path / "out")
    assert_same_bits(tmp_path / "out", AutoModelForCausalLM, expected, torch.float32)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hello").input_ids
    monkeypatch.setattr("lorakit.models.streaming_merge._SHARD_BYTES", 30_000)
    merge_checkpoint(tiny_gguf, [saved], tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    assert_same_bits(tmp_path / "sharded", AutoModelForCausalLM, expected, torch.float32)


def test_what_cannot_be_merged_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", llama, torch.float32)
    good = adapter_in(tmp_path / "good", base, AutoModelForCausalLM, lk.LoRA(r=2))
    before = sorted(p.name for p in tmp_path.iterdir())

    def refused(error: type[Exception], match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            merge_checkpoint(*args, tmp_path / "out", **options)

    refused(ConfigError, "2 weights for 1 adapters", base, [good], weights=[1, 2])
    refused(ConfigError, "at least one adapter", base, [])
    refused(ConfigError, "No dtype is called 'bf16'", base, [good], dtype="bf16")
    refused(ModelError, "is a file", base / "config.json", [good])
    refused(MergeError, "is a name on the hub", "org/model", [good])
    state = lk.read(good)
    broken = {path: {n: t * float("nan") for n, t in group.items()} for path, group in state.tensors.items()}
    lk.save(lk.AdapterState(state.spec, broken), good)
    refused(MergeError, "NaN or an infinity in", base, [good])
    huge = {path: {n: t * 0 + 1e30 for n, t in group.items()} for path, group in state.tensors.items()}
    lk.save(lk.AdapterState(state.spec, huge), good)
    refused(MergeError, "would give a NaN or an infinity in 'model.layers", base, [good])
    prompts = adapter_in(tmp_path / "good", base, AutoModelForCausalLM, lk.PromptTuning(length=2))
    refused(MergeError, "defines no weight", base, [prompts])
    other = base_in(tmp_path / "base", lambda: llama(hidden_size=64), torch.float32)
    adapter_in(tmp_path / "good", other, AutoModelForCausalLM, lk.LoRA(r=2))
    base_in(tmp_path / "base", llama, torch.float32)
    refused(AdapterMismatchError, "belongs to another base", base, [good])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    refused(MergeError, "is quantised", base, [good])
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e300])
def test_a_weight_that_is_no_number_is_refused(tmp_path: Path, weight: float) -> None:
    with pytest.raises(ConfigError, match="must be a finite number"):
        merge_checkpoint(tmp_path, [tmp_path], tmp_path / "out", weights=[weight])


def test_an_adapter_of_two_sides_is_refused_as_in_memory(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", llama, torch.float32)
    one = adapter_in(tmp_path / "one", base, AutoModelForCausalLM, lk.DoRA(lk.LoRA(r=2)), ["q_proj"])
    two = adapter_in(tmp_path / "two", base, AutoModelForCausalLM, lk.FullFineTuning(), ["q_proj"])
    with pytest.raises(lk.LorakitError, match="Choose one"):
        merged_in_memory(base, AutoModelForCausalLM, {one: 1.0, two: 1.0}, torch.float32)
    with pytest.raises(lk.LorakitError, match="Choose one"):
        merge_checkpoint(base, [one, two], tmp_path / "out")


def test_what_is_in_the_way_stays(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", llama, torch.float32)
    saved = adapter_in(tmp_path / "adapter", base, AutoModelForCausalLM, lk.LoRA(r=2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        merge_checkpoint(base, [saved], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"is there. Name another"):
        merge_checkpoint(base, [saved], base, overwrite=True)
    merge_checkpoint(base, [saved], tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")
