"""Quantising a model: what changes, what stays, what is reported, and adapters on it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorakit as lk
from tests.attach.small_models import Mlp, TiedLm, picture, same_values, values

STORAGES = ("nf4", "int8")
ERROR = {"nf4": 0.2, "int8": 0.02}
every = pytest.mark.parametrize("storage", STORAGES)
METHODS = {
    "lora": lk.LoRA(r=2, alpha=4),
    "rslora": lk.LoRA(r=2, alpha=2, scaling="rslora"),
    "dora": lk.DoRA(lk.LoRA(r=2, alpha=4)),
    "dora of rslora and pissa": lk.DoRA(lk.LoRA(r=2, alpha=2, scaling="rslora", init="pissa")),
}


def quantized(model: nn.Module, storage: str = "nf4", **options: Any) -> nn.Module:
    lk.quantize(model, storage, **options)
    return model


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2)).eval()


def tokens() -> Tensor:
    return torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))


@every
@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_a_transformer(build: Any, storage: str) -> None:
    model = build()
    keys = set(dict(model.named_modules()))
    heads = {
        path for path, _ in model.named_parameters() if "embed" in path or "wte" in path or "norm" in path
    }
    with torch.no_grad():
        y = model(tokens()).logits
        report = lk.quantize(model, storage)
        error = (model(tokens()).logits - y).norm() / y.norm()
    assert 0 < error < ERROR[storage]
    assert set(dict(model.named_modules())) == keys
    assert heads <= set(dict(model.named_parameters())), "the head and the embeddings are not quantised"
    assert {layer.path for layer in report.layers} == {t.path for t in lk.find(model)}
    assert report.parameters == sum(t.shape.numel for t in lk.find(model))
    assert (
        report.model_bytes_before - report.model_bytes_after == report.bytes_before - report.bytes_after > 0
    )
    generated = model.generate(tokens()[:, :3], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 6)


@every
def test_the_report(storage: str) -> None:
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 512, bias=False))
    report = lk.quantize(model, storage)
    assert report.parameters == 2 * 512 * 256
    assert report.bytes_before == 4 * report.parameters
    bits = {"nf4": 4.126953125 + 2 * 32 / report.parameters, "int8": 8 + 32 * 768 / report.parameters}
    assert report.bits_per_parameter == pytest.approx(bits[storage], rel=1e-12)
    text = str(report)
    assert text.startswith("Quantised 2 layers, 262,144 parameters: 1.0 MB to ")
    assert f"{report.bits_per_parameter:.3f} bits each" in text
    assert "256 x 512" in text
    assert storage in text


@pytest.mark.parametrize(
    ("options", "bits"), [({"double_quant": False}, 4.5), ({"block": 128}, 4.0634765625)]
)
def test_options_of_nf4(options: dict[str, Any], bits: float) -> None:
    report = lk.quantize(nn.Sequential(nn.Linear(1024, 1024, bias=False)), **options)
    assert report.bits_per_parameter == pytest.approx(bits, abs=1e-4)


@every
def test_only_what_is_named(storage: str) -> None:
    model = Mlp()
    report = lk.quantize(model, storage, ["fc1", "fc2"], exclude=["fc2"])
    assert [layer.path for layer in report.layers] == ["fc1"]
    assert isinstance(model.fc2.weight, nn.Parameter)
    report = lk.quantize(model, storage)
    assert [layer.path for layer in report.layers] == ["fc2"]
    assert report.skipped == (("fc1", f"it is {model.fc1.extra_repr().rsplit('storage=')[-1]} already"),)
    assert "left dense: fc1" in str(report)
    with pytest.raises(lk.LorakitError, match="no layer that can be quantised"):
        lk.quantize(model, storage)


def test_a_preset_leaves_what_cannot_be_quantised_and_says_so() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    report = lk.quantize(model)
    assert {layer.path for layer in report.layers} == {"linear1", "linear2"}
    assert {path for path, _ in report.skipped} == {"self_attn.in_proj_weight", "self_attn.out_proj"}
    x = torch.randn(2, 3, 16)
    assert torch.isfinite(model.eval()(x)).all()
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(x.clone().requires_grad_()).detach())
    with pytest.raises(lk.LorakitError, match=r"'self_attn.out_proj' cannot be quantised"):
        lk.quantize(model, targets=["out_proj"])


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (["head"], "another layer uses the same weight"),
        (["embed"], "only linear layers"),
        (["body[0:3]"], "a part of a layer"),
        (["nowhere"], "matches nothing"),
    ],
)
def test_what_is_named_and_cannot_be_quantised(targets: list[str], reason: str) -> None:
    model = TiedLm()
    before = picture(model)
    with pytest.raises(lk.LorakitError, match=reason):
        lk.quantize(model, targets=["body", *targets])
    assert picture(model) == before


def test_a_weight_that_is_not_finite_is_refused_before_anything_is_touched() -> None:
    model = Mlp()
    with torch.no_grad():
        model.fc2.weight[1, 1] = torch.nan
    before = picture(model)
    with pytest.raises(lk.LorakitError, match=r"'fc2'.*NaN"):
        lk.quantize(model, targets=["fc1", "fc2"])
    assert picture(model) == before
    assert lk.quantize(model).skipped == (("fc2", "its weight holds a NaN or an infinity"),)


@pytest.mark.parametrize("options", [{"storage": "nf3"}, {"storage": "nf4", "block": 48}, {"storage": None}])
def test_a_storage_that_is_not_known(options: dict[str, Any]) -> None:
    model = Mlp()
    before = picture(model)
    with pytest.raises(lk.LorakitError, match=r"nf4|32, 64"):
        lk.quantize(model, **options)
    assert picture(model) == before


@every
def test_dequantising(storage: str) -> None:
    model, x = Mlp(), torch.randn(3, 6)
    model.fc1.weight.requires_grad_(False)
    names = [(n, p.requires_grad) for n, p in model.named_parameters()]
    lk.quantize(model, storage)
    y = model(x)
    assert lk.dequantize(model) == ["fc1", "fc2"]
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == names
    assert type(model.fc1) is nn.Linear
    torch.testing.assert_close(model(x), y)
    with pytest.raises(lk.LorakitError, match="No layer"):
        lk.dequantize(model)


@every
def test_models_with_adapters_are_refused(storage: str) -> None:
    model = quantized(Mlp(), storage, targets=["fc1"])
    lk.attach(model, lk.LoRA(r=2), ["fc1"])
    before = picture(model)
    for call in (lambda: lk.quantize(model, storage, ["fc2"]), lambda: lk.dequantize(model)):
        with pytest.raises(lk.LorakitError, match=r"fc1.*detach"):
            call()
    lk.merge(model)
    with pytest.raises(lk.LorakitError, match="merged"):
        lk.dequantize(model)
    lk.unmerge(model)
    assert picture(model) == before
    lk.merge(model, permanent=True)
    lk.quantize(model, storage, ["fc2"])
    lk.dequantize(model)


@every
@pytest.mark.parametrize("name", METHODS)
def test_training_on_a_quantised_base(name: str, storage: str) -> None:
    model = llama()
    lk.quantize(model, storage)
    base = values(model)
    batch = {"input_ids": tokens(), "labels": tokens()}
    with torch.no_grad():
        y = model(**batch).logits
    lk.attach(model, METHODS[name], seed=0)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, y, rtol=0, atol=1e-5)
    trained = lk.trainable(model)
    assert all(".lorakit." in path for path in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    with torch.no_grad():
        y = model(**batch).logits
        lk.merge(model)
        merged = model(**batch).logits
        assert 0 < (merged - y).norm() / y.norm() < ERROR[storage]
        lk.unmerge(model)
        assert torch.equal(model(**batch).logits, y)
    lk.detach(model)
    assert same_values(model, base)


@every
def test_the_adapter_of_a_quantised_model_is_saved_as_any_other(tmp_path: Path, storage: str) -> None:
    model = quantized(llama(), storage)
    lk.attach(model, METHODS["lora"], seed=0)
    for p in lk.trainable(model).values():
        nn.init.normal_(p, std=0.1)
    lk.save(model, tmp_path / "a")
    dense = llama()
    lk.attach(dense, lk.extract(model))
    lk.save(dense, tmp_path / "b")
    for file in sorted(path.name for path in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    again = quantized(llama(), storage)
    lk.load(again, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@every
def test_peft_reads_it_and_computes_the_same_on_the_same_base(tmp_path: Path, storage: str) -> None:
    peft = pytest.importorskip("peft")
    model = quantized(llama(), storage)
    lk.attach(model, METHODS["dora"], seed=0)
    for p in lk.trainable(model).values():
        with torch.no_grad():
            p.add_(0.05 * torch.randn_like(p))
    lk.save(model, tmp_path / "a")
    base = quantized(llama(), storage)
    lk.dequantize(base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, theirs(tokens()).logits, rtol=0, atol=1e-4)


@every
def test_everything_can_be_counted_on_the_meta_device(storage: str) -> None:
    with torch.device("meta"):
        model = Mlp()
    counted = lk.quantize(model, storage)
    real = lk.quantize(Mlp(), storage)
    assert (counted.layers, counted.model_bytes_after) == (real.layers, real.model_bytes_after)
    twin = copy.deepcopy(model)
    assert (
        lk.attach(twin, lk.LoRA(r=2)).parameters
        == lk.attach(quantized(Mlp(), storage), lk.LoRA(r=2)).parameters
    )


@every
def test_a_model_that_was_quantised_in_inference_mode_trains(storage: str) -> None:
    model = Mlp()
    with torch.inference_mode():
        lk.quantize(model, storage)
    x = torch.randn(2, 6, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    model.fc1.bias = None
    lk.attach(model, lk.LoRA(r=2))
    model(x).sum().backward()


@every
def test_the_default_dtype_has_no_part_in_it(storage: str) -> None:
    model = nn.Sequential(nn.Linear(33, 5))
    expected = quantized(copy.deepcopy(model), storage).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        other = quantized(copy.deepcopy(model), storage)
        assert other(torch.ones(1, 33, dtype=torch.float32)).dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in expected.items())
