"""llama.cpp's adapters: names and rows as the `gguf` package and llama.cpp itself have them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.core import AdapterSpec, AdapterState
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError
from lorakit.io.formats import Hints, read_any, write_as
from lorakit.io.formats.gguf import ARCHITECTURES, model_facts
from lorakit.methods import LoRA
from tests.io.formats.cases import same_bits, through

gguf = pytest.importorskip("gguf")
HEADS = Hints(family="llama", heads=(4, 2))
SIZES = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32),
         "gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}  # fmt: skip


def llama(
    r: int = 2, alpha: float = 8.0, dtype: torch.dtype = torch.float32, layers: int = 2
) -> AdapterState:
    shapes = {}
    for n in range(layers):
        for name, (out, in_) in SIZES.items():
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            shapes[f"model.layers.{n}.{block}.{name}"] = Shape("linear", out=out, in_=in_)
    method = LoRA(r=r, alpha=alpha)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        path: {k: torch.randn(s, generator=generator).to(dtype) for k, s in method.shapes(shape).items()}
        for path, shape in shapes.items()
    }
    return AdapterState(AdapterSpec(dict.fromkeys(shapes, method), shapes, "a/b"), tensors)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_are_those_of_the_gguf_package(family: str) -> None:
    layers, names = ARCHITECTURES[family]
    known = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), 3)
    for theirs, ours in names.items():
        assert known.get_name(f"{layers}.2.{ours}") == f"blk.2.{theirs}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(dtype: torch.dtype) -> None:
    state = llama(dtype=dtype)
    again = through(state, "gguf", ".gguf", HEADS)
    same_bits(state, again)
    assert dict(again.spec.methods) == dict(state.spec.methods)
    assert again.spec.base == "a/b"


def test_our_own_file_says_how_many_heads(tmp_path: Path) -> None:
    state = llama()
    write_as(state, tmp_path / "a.gguf", "gguf", hints=HEADS)
    same_bits(state, read_any(tmp_path / "a.gguf")[0])


def test_rows_of_q_are_pairs_of_a_rotation(tmp_path: Path) -> None:
    state = llama()
    write_as(state, tmp_path / "a.gguf", "gguf", hints=HEADS)
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    B = state.tensors["model.layers.0.self_attn.q_proj"]["lora_B"].numpy()
    for head in range(4):
        for row in range(8):
            half, pair = divmod(row, 4)
            at = head * 8 + 2 * pair + half
            np.testing.assert_array_equal(found["blk.0.attn_q.weight.lora_b"][at], B[head * 8 + row])


def test_qwen_keeps_its_rows() -> None:
    state = llama()
    same_bits(state, through(state, "gguf", ".gguf", Hints(family="qwen2")))


def test_without_the_model_the_order_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="--config"):
        write_as(llama(), tmp_path / "a.gguf", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_one_alpha_for_all(tmp_path: Path) -> None:
    state = llama(layers=1)
    methods = dict(state.spec.methods)
    path = "model.layers.0.self_attn.v_proj"
    methods[path] = LoRA(r=2, alpha=16.0)
    mixed = AdapterState(AdapterSpec(methods, state.spec.shapes), state.tensors)
    assert "alphas other than 8" in write_as(mixed, tmp_path / "a.gguf", "gguf", hints=HEADS)[0]
    again, _ = read_any(tmp_path / "a.gguf")
    assert torch.equal(again.tensors[path]["lora_B"], 2 * state.tensors[path]["lora_B"])


@pytest.mark.parametrize("cut", [0, 3, 20, 100, 1000, 5000])
def test_a_cut_off_file_is_said_to_be_damaged(tmp_path: Path, cut: int) -> None:
    write_as(llama(), tmp_path / "a.gguf", "gguf", hints=HEADS)
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(data[:cut])
    with pytest.raises(AdapterFileError, match="damaged"):
        read_any(tmp_path / "b.gguf")


def test_a_count_beyond_the_file_is_not_believed(tmp_path: Path) -> None:
    write_as(llama(), tmp_path / "a.gguf", "gguf", hints=HEADS)
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    data[8:16] = (2**62).to_bytes(8, "little")
    (tmp_path / "b.gguf").write_bytes(data)
    with pytest.raises(AdapterFileError, match="more than it has room for"):
        read_any(tmp_path / "b.gguf")


# ---- llama.cpp itself
def _base(folder: Path, state: AdapterState) -> tuple[Path, Any]:
    """A small random Llama for transformers and for llama.cpp."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, max_position_embeddings=64, tie_word_embeddings=False, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2) if parameter.dim() > 1 else parameter.data.fill_(1)
    writer = gguf.GGUFWriter(folder / "base.gguf", "llama")
    for add, value in (
        (writer.add_context_length, 64), (writer.add_embedding_length, 32), (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 48), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, 8),
        (writer.add_rope_freq_base, 10000.0), (writer.add_vocab_size, 40),
        (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_tokenizer_model, "llama"),
    ):  # fmt: skip
        add(value)
    words = ["<unk>", "<s>", "</s>", *(chr(ord("A") + n) for n in range(36)), "▁"]
    writer.add_token_list([word.encode() for word in words])
    writer.add_token_scores([0.0] * 40)
    writer.add_token_types([2, 3, 3, *[1] * 37])
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, value in model.state_dict().items():
        array = value.numpy()
        for name, count in (("q_proj", 4), ("k_proj", 2)):
            if name in key:
                array = array.reshape(count, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(known.get_name(key, (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "base.gguf", model


def _first_token(base: Path, adapter: Path | None, tokens: list[int]) -> dict[int, float]:
    """llama.cpp's log-probabilities of the next token."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.warmup, params.cpuparams.n_threads = 64, False, 1
    # Both round keys and values to float16.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    answer = xllamacpp.Server(params).handle_completions(
        {"prompt": tokens, "n_predict": 1, "n_probs": 40, "temperature": 1.0, "samplers": []}
    )
    answer = json.loads(answer) if isinstance(answer, str) else answer
    listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {each["id"]: each["logprob"] for each in listed}


def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp's Python wheel is not installed")
    import lorakit as lk

    state = llama(r=2, alpha=0.5)
    base, model = _base(tmp_path, state)
    model.save_pretrained(tmp_path / "model")
    family, heads = model_facts(tmp_path / "model")
    write_as(state, tmp_path / "a.gguf", "gguf", hints=Hints(family=family, heads=heads))
    tokens = [1, 5, 9, 30, 7, 12]
    with torch.no_grad():
        plain = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        lk.attach(model, state)
        adapted = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    assert (plain - adapted).abs().max() > 1
    for want, adapter in ((plain, None), (adapted, tmp_path / "a.gguf")):
        found = _first_token(base, adapter, tokens)
        assert len(found) > 30
        assert max(abs(want[at].item() - p) for at, p in found.items() if math.isfinite(p)) < 1e-4
