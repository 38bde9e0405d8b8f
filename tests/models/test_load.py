"""Loading models and tokenizers: tiny ones made here, and the real built-in ones."""

from __future__ import annotations

import os

import pytest
import torch

from lorakit.errors import ConfigError, MissingDependencyError, ModelError
from lorakit.models import load_model, load_tokenizer, resolve
from lorakit.models.gguf_import import convert_gguf
from lorakit.models.load import compute_dtype


@pytest.fixture
def llama(tiny_gguf, tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    convert_gguf(tiny_gguf, folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT without pooler and head, in bfloat16."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config, add_pooling_layer=False).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_causal_model_is_loaded_ready_for_inference(llama):
    model = load_model(llama, device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert model.dtype == torch.float32


def test_what_was_resolved_can_be_loaded(llama):
    resolved = resolve(llama)
    assert load_model(resolved, device="cpu").config.model_type == "llama"
    assert load_tokenizer(resolved).eos_token == "<|im_end|>"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_by_name_or_itself(llama, dtype):
    assert load_model(llama, dtype=dtype, device="cpu").dtype == torch.bfloat16


def test_auto_is_float32_on_a_cpu_and_the_checkpoints_own_elsewhere(bert):
    assert load_model(bert, task="sequence-classification", device="cpu").dtype == torch.float32
    assert compute_dtype("auto", torch.device("cuda")) == "auto"  # transformers reads it from the checkpoint


def test_a_classifier_gets_a_head_of_the_size_asked_for(bert):
    model = load_model(bert, task="sequence-classification", num_labels=7, device="cpu")
    assert model.classifier.out_features == 7
    assert model.config.num_labels == 7


def test_a_decoder_classifies_at_the_last_token_before_the_padding(llama, tmp_path):
    config = llama / "config.json"
    config.write_text(config.read_text().replace('"pad_token_id": 2', '"pad_token_id": null'))
    model = load_model(llama, task="sequence-classification", num_labels=3, device="cpu")
    tokenizer = load_tokenizer(llama)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        short = model(**tokenizer(["hello"], return_tensors="pt")).logits[0]
        batch = model(**tokenizer(["hello", "hello hello hello"], padding=True, return_tensors="pt")).logits[
            0
        ]
    torch.testing.assert_close(batch, short)


def test_a_model_without_the_weights_of_the_task_is_refused(bert):
    with pytest.raises(ModelError, match=r"no weights for \d+ parameters .*'causal-lm'.*BertModel"):
        load_model(bert, task="causal-lm", device="cpu")


def test_missing_base_weights_are_refused_for_a_classifier_too(llama):
    from safetensors.torch import load_file, save_file

    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    for task in ("causal-lm", "sequence-classification"):
        with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            load_model(llama, task=task, device="cpu")


def test_a_family_without_the_task_is_refused_in_few_words(llama):
    with pytest.raises(ModelError, match="'seq2seq'") as caught:
        load_model(llama, task="seq2seq", device="cpu")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("damage", ["truncated", "garbage", "gone"])
def test_damaged_weights_are_named(llama, damage):
    weights = llama / "model.safetensors"
    if damage == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    elif damage == "garbage":
        weights.write_bytes(b"\xff" * 64)
    else:
        weights.unlink()
    with pytest.raises(ModelError) as caught:
        load_model(llama, device="cpu")
    assert str(llama) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"task": "causal_lm"}, "Did you mean 'causal-lm'"),
        ({"dtype": "bf16"}, "Did you mean 'bfloat16'"),
        ({"dtype": torch.int8}, "floating-point"),
        ({"num_labels": 2}, "num_labels=2"),
        ({"task": "sequence-classification", "num_labels": 0}, "at least 1"),
        ({"revision": "main"}, "not a hub id"),
    ],
)
def test_options_that_make_no_sense_are_refused(llama, options, expected):
    with pytest.raises(ConfigError, match=expected):
        load_model(llama, device="cpu", **options)


def test_a_folder_without_a_tokenizer_says_so(bert, llama):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).unlink()
    for folder in (bert, llama):
        with pytest.raises(ModelError, match="tokenizer"):
            load_tokenizer(folder)


@pytest.mark.parametrize(
    ("settings", "pad"),
    [
        ({"unk_token": "<unk>", "eos_token": "</s>"}, "<unk>"),
        ({"eos_token": "</s>"}, "</s>"),
        ({"eos_token": "</s>", "unk_token": "</s>"}, "</s>"),
        ({"eos_token": "</s>", "pad_token": "<pad>"}, "<pad>"),
    ],
)
def test_a_tokenizer_can_always_pad(tmp_path, settings, pad):
    save_tokenizer(tmp_path, settings)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == pad
    assert len(tokenizer) == 5  # nothing was added
    assert tokenizer(["a", "a b"], padding=True)["attention_mask"] == [[1, 0], [1, 1]]


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tmp_path):
    save_tokenizer(tmp_path, {})
    with pytest.raises(ModelError, match="pad_token"):
        load_tokenizer(tmp_path)


def save_tokenizer(folder, settings: dict[str, str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1, "<pad>": 2, "a": 3, "b": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')


def test_without_transformers_the_error_names_the_extra(llama, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    for load in (load_model, load_tokenizer):
        with pytest.raises(MissingDependencyError, match=r"lorakit\[train\]"):
            load(llama)


def test_a_hub_id_that_cannot_be_reached_names_the_builtin_twin(monkeypatch):
    import huggingface_hub.constants
    import transformers.utils.hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True)
    with pytest.raises(ModelError, match="built in as 'smollm2'"):
        load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct", revision="no-such-branch")
    with pytest.raises(ModelError, match="Check the id and the network"):
        load_model("nobody/nothing", device="cpu")


@pytest.mark.model
def test_smollm2_is_the_model_that_its_card_describes():
    model = load_model("smollm2", device="cpu")
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.model
def test_smollm2_answers_in_english_and_stops():
    model, tokenizer = load_model("smollm2", device="cpu"), load_tokenizer("smollm2")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    text = tokenizer.decode(prompt["input_ids"][0])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.model
def test_smollm2_tokenizer_cuts_as_it_was_trained():
    tokenizer = load_tokenizer("smollm2")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]
    assert tokenizer.tokenize("x = 2026;") == ["x", "Ġ=", "Ġ", "2", "0", "2", "6", ";"]
    assert tokenizer("<|im_end|>").input_ids == [2]
    text = "SELECT name FROM t WHERE year >= 1999\n\n1. naïve — 東京"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.model
def test_minilm_puts_like_sentences_near_each_other():
    model = load_model("minilm", task="feature-extraction", device="cpu")
    tokenizer = load_tokenizer("minilm")
    sentences = ["A man is eating food.", "A man eats something.", "The stock market fell today."]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.8
    assert far < 0.2
