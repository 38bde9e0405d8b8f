"""Layers of bitsandbytes: adapted, merged and put back like any other (the contracts have them as `linear-bnb4`)."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk

bnb = pytest.importorskip("bitsandbytes")

IN, OUT = 128, 64


def four_bit(quant_type: str = "nf4", nested: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of one 4-bit layer, and a norm in front."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=dtype, quant_type=quant_type, compress_statistics=nested)
    layer.weight.data = layer.weight.data.to(dtype)
    layer.support_avx512bf16_for_cpu = False
    model = nn.Sequential()
    model.add_module("norm", nn.LayerNorm(IN, dtype=dtype))
    model.add_module("layer", layer.to("cpu"))
    return model


def eight_bit() -> nn.Module:
    """A model of one 8-bit layer."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    model = nn.Sequential()
    model.add_module("layer", layer.to("cpu"))
    return model


KINDS = {
    "nf4": four_bit,
    "nf4-plain": lambda: four_bit(nested=False),
    "fp4": lambda: four_bit("fp4"),
    "int8": eight_bit,
}
every = pytest.mark.parametrize("kind", KINDS)


def vectors(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapted(model: nn.Module, method: Any) -> Any:
    """The target, with an adapter on it whose parameters are random."""
    lk.attach(model, method, ["layer"], seed=0)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    from lorakit.attach.attachments import attachments_of

    return attachments_of(model).slots[0].target


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@every
@pytest.mark.parametrize(
    "method", [lk.LoRA(r=4), lk.LoRA(r=4, scaling="rslora"), lk.DoRA(lk.LoRA(r=4))], ids=str
)
def test_methods_act_on_the_values_of_the_codes(kind: str, method: Any) -> None:
    model = KINDS[kind]()
    base = model(vectors())
    target = adapted(model, method)
    assert target.binding == "forward"
    W = target.weight().float()
    x = model.norm(vectors()) if hasattr(model, "norm") else vectors()
    torch.testing.assert_close(x @ W.T + model.layer.bias, base, rtol=0, atol=1e-4)
    p = {name.rsplit(".", 1)[-1]: t for name, t in lk.trainable(model).items()}
    expected = x @ method.weight(target, p, W).T + model.layer.bias
    y = model(vectors())
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-4)
    y.sum().backward()
    got = [t.grad.clone() for t in p.values()]
    want = torch.autograd.grad(expected.sum(), list(p.values()))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@every
def test_merging_requantises_and_unmerging_restores_every_bit(kind: str) -> None:
    model = KINDS[kind]()
    target = adapted(model, lk.LoRA(r=4))
    model(vectors())
    before, y = tensors(model), model(vectors())
    weight = model.layer.weight
    p = {name.rsplit(".", 1)[-1]: t.detach() for name, t in lk.trainable(model).items()}
    new = target.weight() + (4 * p["lora_B"] @ p["lora_A"]).to(target.weight().dtype)
    lk.merge(model)
    if kind == "int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(new.half())
        stored = bnb.functional.int8_vectorwise_dequant(codes, scales)
    else:
        state = weight.quant_state
        codes, again = bnb.functional.quantize_4bit(
            new, blocksize=64, compress_statistics=state.nested, quant_type=state.quant_type
        )
        stored = bnb.functional.dequantize_4bit(codes, again)
    torch.testing.assert_close(target.weight().float(), stored.float(), rtol=0, atol=2e-3)
    error = (model(vectors()) - y).norm() / y.norm()
    assert 0 < error < (0.02 if kind == "int8" else 0.2)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        lk.unmerge(one)
        assert torch.equal(one(vectors()), y)
        after = one.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[k], v) for k, v in before.items())
    assert model.layer.weight is weight


@pytest.mark.parametrize("kind", ["nf4", "nf4-plain", "fp4"])
def test_copies_and_pickles(kind: str) -> None:
    model = KINDS[kind]()
    adapted(model, lk.DoRA(lk.LoRA(r=4)))
    y = model(vectors())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(vectors()), y)
        lk.merge(twin)
        lk.unmerge(twin)
        assert torch.equal(twin(vectors()), y)


@pytest.mark.parametrize("nested", [True, False])
def test_the_weight_that_the_cpu_kernel_repacks_is_read(nested: bool) -> None:
    """Where there is AVX512-BF16, `eval()` without gradients interleaves rows and rounds the scales to bfloat16."""
    model = four_bit(nested=nested, dtype=torch.bfloat16)
    model.layer.support_avx512bf16_for_cpu = bnb.functional.has_avx512bf16()
    if not model.layer.support_avx512bf16_for_cpu:
        pytest.skip("this processor has no AVX512-BF16")
    (target,) = lk.find(model, ["layer"])
    W = target.weight().float()
    state = tensors(model)
    assert target.weight().dtype is torch.bfloat16
    model.eval()
    with torch.no_grad():
        model(vectors(torch.bfloat16))
    assert model.layer.weight.quant_state.packing_format_for_cpu
    repacked = target.weight()
    assert repacked.dtype is torch.bfloat16
    assert (repacked.float() - W).norm() / W.norm() < 5e-3
    assert target.stored.shape == (OUT, IN)
    adapted(model, lk.LoRA(r=4))
    with torch.no_grad():
        y = model(vectors(torch.bfloat16))
        lk.merge(model)
        merged = model(vectors(torch.bfloat16))
        assert 0 < (merged - y).float().norm() / y.float().norm() < 0.2
        lk.unmerge(model)
        assert torch.equal(model(vectors(torch.bfloat16)), y)
    assert state.keys() <= model.state_dict().keys()


def test_a_layer_that_is_not_quantised_yet_says_so() -> None:
    model = nn.Sequential()
    model.add_module("layer", bnb.nn.Linear4bit(IN, OUT))
    with pytest.raises(lk.LorakitError, match="move the model to its device"):
        lk.attach(model, lk.LoRA(), ["layer"])
    model = nn.Sequential()
    model.add_module("layer", bnb.nn.Linear8bitLt(IN, OUT))
    with pytest.raises(lk.LorakitError, match="has_fp16_weights=False"):
        lk.attach(model, lk.LoRA(), ["layer"])


def test_its_codes_cannot_be_trained_or_quantised_again() -> None:
    model = four_bit()
    with pytest.raises(lk.LorakitError, match="quantised"):
        lk.attach(model, lk.FullFineTuning(), ["layer"])
    with pytest.raises(lk.LorakitError, match="few bits already"):
        lk.quantize(model, "nf4", ["layer"])
