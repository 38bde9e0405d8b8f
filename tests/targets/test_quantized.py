"""Layers whose weight is quantised: still the user's layers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.targets.quantized import (
    Int8Storage,
    NF4Storage,
    QuantizedStorage,
    dequantize_layer,
    keep_packed,
    packed_weight,
    quantized_storage,
)

STORAGES: dict[str, QuantizedStorage] = {
    "nf4": NF4Storage(),
    "nf4-plain": NF4Storage(32, double_quant=False),
    "int8": Int8Storage(),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 10),
    "linear-nobias": lambda: nn.Linear(12, 10, bias=False),
    "conv1d": lambda: Conv1D(10, 12),
}
every_storage = pytest.mark.parametrize("storage", STORAGES)
every_layer = pytest.mark.parametrize("layer", LAYERS)


def made(layer: str, storage: str) -> tuple[nn.Module, Tensor]:
    """A quantised layer, and the matrix that it had."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = LAYERS[layer]()
    assert isinstance(module.weight, Tensor)
    matrix = module.weight.detach().clone()
    matrix = matrix.mT if layer == "conv1d" else matrix
    form = STORAGES[storage]
    keep_packed(module, form, form.encode(matrix))
    return module, matrix


def vectors(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


@every_storage
@every_layer
def test_it_computes_with_the_values_of_its_codes(layer: str, storage: str) -> None:
    module, matrix = made(layer, storage)
    values = STORAGES[storage].encode(matrix).dequantize()
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(module(vectors()), vectors() @ values.T + bias)
    stored = module.weight.mT if layer == "conv1d" else module.weight
    assert torch.equal(stored, values)
    assert quantized_storage(module) == STORAGES[storage]
    assert quantized_storage(LAYERS[layer]()) is None


@every_storage
@every_layer
def test_it_stays_a_layer_of_its_class(layer: str, storage: str) -> None:
    module, _ = made(layer, storage)
    dense = type(LAYERS[layer]())
    assert isinstance(module, dense)
    assert type(module).__name__ == dense.__name__
    assert "weight" not in dict(module.named_parameters())
    assert str(STORAGES[storage]) in module.extra_repr() or layer == "conv1d"
    if layer == "linear":
        assert module(input=vectors()).shape == (2, 3, 10)
    if layer == "conv1d":
        assert module(x=vectors()).shape == (2, 3, 10)
    with pytest.raises((AttributeError, KeyError)):
        module.weight = nn.Parameter(torch.ones(1))


@every_storage
@every_layer
def test_copies_and_pickles(layer: str, storage: str) -> None:
    module, _ = made(layer, storage)
    y = module(vectors())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert type(twin) is type(module)
        assert torch.equal(twin(vectors()), y)
        packed_weight(twin).tensors["codes"].add_(1)
        assert torch.equal(module(vectors()), y)
        twin.double()
        assert module(vectors()).dtype is torch.float32


@every_storage
@every_layer
def test_a_state_dict_round_trip(layer: str, storage: str) -> None:
    module, _ = made(layer, storage)
    other = LAYERS[layer]()
    form = STORAGES[storage]
    keep_packed(other, form, form.encode(torch.ones(10, 12)))
    state = module.state_dict()
    assert "weight_codes" in state
    assert "weight" not in state
    other.load_state_dict(state)
    assert torch.equal(other(vectors()), module(vectors()))
    with pytest.raises(RuntimeError, match="weight_codes"):
        other.load_state_dict(LAYERS[layer]().state_dict())


@every_storage
@every_layer
def test_a_cast_changes_what_it_computes_in_and_no_code(layer: str, storage: str) -> None:
    module, _ = made(layer, storage)
    values = module.weight.double()
    before = {name: t.clone() for name, t in packed_weight(module).tensors.items()}
    module.register_buffer("other", torch.ones(2))
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        assert module.to(dtype) is module
        assert module.weight.dtype is dtype
        assert torch.equal(module.weight, values.to(dtype))
        assert module(vectors(dtype)).dtype is dtype
        assert module.other.dtype is dtype
        after = packed_weight(module).tensors
        assert all(torch.equal(after[k], t) and after[k].dtype is t.dtype for k, t in before.items())
    module.type(torch.float64)
    assert packed_weight(module).tensors["codes"].dtype is before["codes"].dtype


@every_storage
@every_layer
def test_a_move_takes_codes_and_scales_along(layer: str, storage: str) -> None:
    module, _ = made(layer, storage)
    names = list(module.state_dict())
    module.to("meta")
    assert {b.device.type for b in module.buffers()} == {"meta"}
    assert list(module.state_dict()) == names
    assert module.weight.is_meta
    assert module(vectors().to("meta")).shape == (2, 3, 10)


@every_storage
@every_layer
def test_the_storage_puts_back_every_bit(layer: str, storage: str) -> None:
    module, _ = made(layer, storage)
    form = STORAGES[storage]
    values, y = module.weight.clone(), module(vectors())
    kept = form.snapshot(module, "weight")
    new = torch.randn_like(values)
    form.store(module, "weight", new)
    matrix = new.mT if layer == "conv1d" else new
    stored = form.encode(matrix).dequantize()
    assert torch.equal(module.weight, stored.mT if layer == "conv1d" else stored)
    assert not torch.equal(module.weight, values)
    module.to(torch.bfloat16)
    form.restore(module, "weight", kept)
    module.to(torch.float32)
    assert torch.equal(module.weight, values)
    assert torch.equal(module(vectors()), y) or module.bias is not None  # whose cast to bfloat16 rounded it
    assert all(packed_weight(module).tensors[k] is t for k, t in kept.items())


@every_storage
@every_layer
def test_the_facts_need_no_values(layer: str, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = made(layer, storage)
    size = tuple(module.weight.shape)
    monkeypatch.setattr(type(STORAGES[storage]), "load", None)
    (target,) = lk.find(nn.Sequential(module), ["0"])
    assert (target.out, target.in_) == (10, 12)
    assert tuple(target.stored.shape) == size
    assert target.stored.dtype is torch.float32
    assert target.binding == "forward"


@every_storage
@every_layer
def test_dequantising_gives_the_layer_back(layer: str, storage: str) -> None:
    module, _ = made(layer, storage)
    y, values = module(vectors()), module.weight.clone()
    dequantize_layer(module)
    dense = LAYERS[layer]()
    assert type(module) is type(dense)
    assert list(module.state_dict()) == list(dense.state_dict())
    assert set(vars(module)) == set(vars(dense))
    assert torch.equal(module.weight, values)
    assert module.weight.requires_grad
    torch.testing.assert_close(module(vectors()), y)


@every_storage
def test_another_dtype_is_refused_and_autocast_is_not(storage: str) -> None:
    module, _ = made("linear", storage)
    with pytest.raises(RuntimeError, match=r"computes in torch.float32 and was given torch.bfloat16"):
        module(vectors(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        y = module(vectors())
        assert y.dtype is torch.bfloat16
        assert module.double()(vectors(torch.float64)).dtype is torch.float64  # as a dense layer
    torch.testing.assert_close(y.double(), module(vectors(torch.float64)), rtol=0, atol=2e-2)


@every_storage
@every_layer
def test_gradients_reach_the_input_and_the_bias(layer: str, storage: str) -> None:
    module, _ = made(layer, storage)
    module.double()
    x = vectors(torch.float64).requires_grad_()
    module(x).square().sum().backward()
    got = x.grad
    dense = copy.deepcopy(module)
    dequantize_layer(dense)
    x = vectors(torch.float64).requires_grad_()
    dense(x).square().sum().backward()
    torch.testing.assert_close(got, x.grad)
    if module.bias is not None:
        torch.testing.assert_close(module.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_bound_bias_keeps_the_quantised_product(storage: str) -> None:
    """A layer may be of two classes at once: with a quantised weight, and with a parameter that an adapter binds."""
    module, _ = made("linear", storage)
    model = nn.Sequential()
    model.add_module("layer", module)
    y = model(vectors())
    lk.attach(model, lk.BitFit(), ["layer.bias"])
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.add_(1)
    torch.testing.assert_close(model(vectors()), y + 1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(vectors()), y + 1)
        lk.detach(twin)
        assert type(twin.layer) is type(made("linear", storage)[0])
        assert torch.equal(twin(vectors()), y)


@pytest.mark.parametrize("name", ["layer", "layer.weight", "all-parameters"])
def test_a_whole_quantised_weight_cannot_be_trained(name: str) -> None:
    module, _ = made("linear", "nf4")
    model = nn.Sequential()
    model.add_module("layer", module)
    targets = name if name.startswith("all-") else [name]
    with pytest.raises(lk.LorakitError, match=r"'layer.weight' cannot be adapted: it is quantised"):
        lk.attach(model, lk.FullFineTuning(), targets)
    report = lk.attach(model, lk.FullFineTuning(), "all-parameters", exclude=["layer.weight"])
    assert [site.path for site in report.sites] == ["layer.bias"]


@every_storage
@every_layer
def test_a_compiled_layer(layer: str, storage: str) -> None:
    torch._dynamo.reset()
    module, _ = made(layer, storage)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x, other = vectors().requires_grad_(), vectors().requires_grad_()
    compiled(x).sum().backward()
    module(other).sum().backward()
    torch.testing.assert_close(compiled(x), module(x))
    torch.testing.assert_close(x.grad, other.grad)
