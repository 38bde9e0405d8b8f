"""PEFT's prefix and prompt files, both ways, against PEFT itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import AdapterFileError, AdapterMismatchError
from lorakit.io import why_not_peft
from lorakit.io.model_outline import outline_of
from tests.attach.readers import DECODERS, answer, padded, reader, texts

LENGTH = 3
READERS = ("llama", "qwen2", "gpt2", "bert")
TASKS = {"bert": "SEQ_CLS", "body": "FEATURE_EXTRACTION"}
METHODS = {
    "prefix": (lk.PrefixTuning(length=LENGTH), peft.PrefixTuningConfig, {}),
    "prefix_mlp": (
        lk.PrefixTuning(length=LENGTH, mlp=5),
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 5},
    ),
    "prompt": (lk.PromptTuning(length=LENGTH), peft.PromptTuningConfig, {}),
}
names = pytest.mark.parametrize("name", [*READERS, "body", "roberta"])
methods = pytest.mark.parametrize("method", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore")


def base(name: str) -> nn.Module:
    return reader("bert").bert if name == "body" else reader(name)


def task(name: str) -> str:
    return TASKS.get(name, "CAUSAL_LM" if name in DECODERS else "SEQ_CLS")


def theirs(name: str, method: str) -> Any:
    """A model of PEFT's with a random adapter (and head)."""
    torch.manual_seed(1)
    _, config, settings = METHODS[method]
    model = peft.get_peft_model(
        base(name), config(task_type=task(name), num_virtual_tokens=LENGTH, **settings)
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    return model.eval()


def ours(name: str, method: str) -> nn.Module:
    """The same of ours; a classifier has its head trained along."""
    model, (own, _, _) = base(name), METHODS[method]
    if task(name) == "SEQ_CLS":
        pooled = lk.PromptTuning(length=LENGTH, pooled="prompt") if method == "prompt" else own
        lk.attach(model, {own.default_targets: pooled, "classifier": lk.FullFineTuning()}, seed=0)
    else:
        lk.attach(model, own, seed=0)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "lorakit" in path.split("."):
                p.add_(torch.randn(p.shape, generator=draw))
    return model


def outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What both give for the tokens: PEFT gives the prompt's own positions too."""
    with torch.no_grad():
        out = model(**batch)[0]
    if out.dim() == 2:
        return out
    return out[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]


BATCH = padded(texts(6, 4), "right")


@names
@methods
def test_a_file_of_pefts_gives_pefts_outputs(name: str, method: str, tmp_path: Path) -> None:
    other = theirs(name, method)
    other.save_pretrained(tmp_path)
    model = base(name)
    lk.load(model, tmp_path)
    torch.testing.assert_close(outputs(model, BATCH), outputs(other, BATCH), rtol=0, atol=1e-5)


@names
@methods
def test_peft_gives_our_outputs_for_a_file_of_ours(name: str, method: str, tmp_path: Path) -> None:
    model = ours(name, method)
    lk.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task(name)
    other = peft.PeftModel.from_pretrained(base(name), tmp_path).eval()
    torch.testing.assert_close(outputs(other, BATCH), outputs(model, BATCH), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@methods
def test_both_write_the_same_text(name: str, method: str, tmp_path: Path) -> None:
    other = theirs(name, method)
    other.save_pretrained(tmp_path)
    model = base(name)
    lk.load(model, tmp_path)
    batch = padded(texts(5, 5), "left")
    assert torch.equal(answer(model, batch), answer(other, batch))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_gradients_are_pefts(name: str, method: str, tmp_path: Path) -> None:
    other = theirs(name, method)
    other.save_pretrained(tmp_path)
    model = base(name)
    lk.load(model, tmp_path, trainable=True)
    labels = BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, -100)
    labels[:, 0] = -100  # PEFT has a prompt predict the first token; here nothing stands before it
    for each in (model, other):
        each(**BATCH, labels=labels).loss.backward()
    expected = other.prompt_encoder["default"].embedding.weight.grad
    grads = {path: p.grad for path, p in lk.trainable(model).items()}
    got = torch.cat(list(grads.values()), dim=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@names
@methods
def test_what_is_read_is_written_again_alike(name: str, method: str, tmp_path: Path) -> None:
    theirs(name, method).save_pretrained(tmp_path / "one")
    model = base(name)
    lk.load(model, tmp_path / "one")
    lk.save(model, tmp_path / "two")
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("one", "two")]
    differing = {k for k in configs[0].keys() | configs[1].keys() if configs[0].get(k) != configs[1].get(k)}
    assert differing <= {
        "prefix_projection",
        "modules_to_save",
    }  # the network is gone; PEFT names heads twice


def test_layers_are_numbered_not_sorted(tmp_path: Path) -> None:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=50, n_embd=8, n_layer=12, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    model = hf.GPT2LMHeadModel(config).eval()
    plain = copy.deepcopy(model)
    lk.attach(model, lk.PrefixTuning(length=2), seed=0)
    lk.save(model, tmp_path)
    state = lk.read(tmp_path)  # without the model: our own file says where it belongs
    assert list(state.tensors) == [f"transformer.h.{i}.attn" for i in range(12)]
    for again in (lk.attach, lambda m, _: lk.load(m, tmp_path, name="other")):
        twin = copy.deepcopy(plain)
        again(twin, state)
        assert torch.equal(outputs(twin, BATCH), outputs(model, BATCH))


@pytest.mark.parametrize("method", ["prefix_mlp", "prompt"])
def test_the_native_form_keeps_everything(method: str, tmp_path: Path) -> None:
    model = ours("llama", method)
    state = lk.extract(model)
    lk.save(state, tmp_path, form="native")
    again = lk.read(tmp_path)
    assert again.spec == state.spec
    assert [(p, n) for p, n, _ in again.all_tensors()] == [(p, n) for p, n, _ in state.all_tensors()]
    twin = base("llama")
    lk.attach(twin, again)
    assert torch.equal(outputs(twin, BATCH), outputs(model, BATCH))


def edited(
    folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None
) -> Path:
    theirs("llama", "prefix").save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    weights = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in (load_file(weights) | (tensors or {})).items() if v.numel()}, weights)
    return folder


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"num_virtual_tokens": 4}, {}, "3 rows, and num_virtual_tokens is 4"),
        ({"num_transformer_submodules": 2}, {}, "encoder-decoder"),
        ({"num_layers": 5}, {}, "belongs to another base model"),
        ({"made_up": 1}, {}, "made_up=1"),
        ({}, {"base_model.score.weight": torch.ones(2, 2)}, "unexpected: base_model.score.weight"),
        (
            {},
            {"prompt_embeddings": torch.ones(3, 5)},
            "5 columns for 2 layers; the model has 2 attentions, which take 32",
        ),
        ({}, {"prompt_embeddings": torch.ones(2, 2, 2)}, r"size \(2, 2, 2\)"),
        ({}, {"prompt_embeddings": torch.empty(0)}, "prompt_embeddings is missing|holds no"),
        ({}, {"prompt_embeddings": torch.ones(3, 32, dtype=torch.long)}, "int64"),
    ],
)
def test_what_does_not_fit_is_refused(
    config: dict[str, Any], tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterFileError, match=message):
        lk.load(reader("llama"), edited(tmp_path, config, tensors))


def test_a_prefix_of_pefts_needs_the_model(tmp_path: Path) -> None:
    theirs("llama", "prefix").save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"lorakit.load\(model"):
        lk.read(tmp_path)
    with pytest.raises(AdapterFileError, match="another base model"):
        lk.load(reader("gpt2"), tmp_path)
    with pytest.raises(AdapterFileError, match="no attentions"):
        lk.load(nn.Sequential(nn.Linear(2, 2)), tmp_path)


def test_a_prompt_of_pefts_needs_none(tmp_path: Path) -> None:
    theirs("llama", "prompt").save_pretrained(tmp_path)
    state = lk.read(tmp_path)
    assert list(state.tensors) == [""]
    with pytest.raises(AdapterMismatchError, match="another base model"):
        lk.attach(base_of_width(8), state)


def base_of_width(width: int) -> nn.Module:
    import transformers as hf

    return hf.GPT2Model(hf.GPT2Config(vocab_size=50, n_embd=width, n_layer=1, n_head=2, n_positions=32))


def test_what_peft_has_no_words_for() -> None:
    def reasons(name: str, adapter: Any, **options: Any) -> str:
        model = base(name)
        lk.attach(model, adapter, **options)
        return " ".join(why_not_peft(lk.extract(model), outline=outline_of(model)))

    assert "at every attention of the model, 2; this one is at 1" in reasons(
        "llama", METHODS["prefix"][0], targets=["layers.0"]
    )
    assert "pool the first token" in reasons("bert", lk.PromptTuning())
    assert reasons("bert", lk.PromptTuning(pooled="prompt")) == ""
    assert "this adapter is for FEATURE_EXTRACTION" in reasons("body", lk.PromptTuning(pooled="prompt"))
    assert reasons("llama", lk.PromptTuning(pooled="prompt")) == ""
    both = {"all-inputs": lk.PromptTuning(), "all-linear": lk.LoRA()}
    assert "one type of adapter in a file" in reasons("llama", both)
    half = {"all-attention": lk.PrefixTuning(), "classifier.weight": lk.FullFineTuning()}
    assert "only a part of the one that holds 'classifier.weight'" in reasons("bert", half)
    mixed = {"layers.0.self_attn": lk.PrefixTuning(length=2), "layers.1.self_attn": lk.PrefixTuning(length=3)}
    assert "one length for all attentions" in reasons("llama", mixed)
    state = lk.extract(ours("llama", "prefix"))
    assert "save it from the model" in " ".join(why_not_peft(state))


def test_pefts_classifier_pools_the_prompt_and_ours_the_first_token() -> None:
    """The difference by name: one prompt on one BERT, pooled as PEFT does and pooled as if it were not there."""
    other = theirs("bert", "prompt")
    model = base("bert")
    lk.attach(model, lk.PromptTuning(length=LENGTH))
    head = other.base_model.classifier.modules_to_save["default"]
    with torch.no_grad():
        (prompt,) = (p for n, p in model.named_parameters() if n.endswith("prompt"))
        prompt.copy_(other.prompt_encoder["default"].embedding.weight)
        model.classifier.load_state_dict(head.state_dict())
        states = other.base_model.bert(
            inputs_embeds=torch.cat(
                [prompt.expand(2, -1, -1), model.get_input_embeddings()(BATCH["input_ids"])], dim=1
            ),
            attention_mask=torch.cat([torch.ones(2, LENGTH), BATCH["attention_mask"]], dim=1),
        ).last_hidden_state
        for runs, at in ((other, 0), (model, LENGTH)):
            expected = model.classifier(model.bert.pooler(states[:, at:]))
            torch.testing.assert_close(outputs(runs, BATCH), expected, rtol=0, atol=1e-5)
