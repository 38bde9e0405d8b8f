"""Start, forward and gradients against the dense float64 formula."""

from __future__ import annotations

import pytest
import torch

import lorakit as lk
from tests.contracts.pairs import TOLERANCE, Case, close, pairs

dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["64", "32", "bf16"]
)

EPSILON = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@dtypes
@pairs(fresh=True)
def test_a_fresh_adapter_leaves_every_bit_of_the_output(setting: str, kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, dtype)
    case.model.requires_grad_(False)
    before = case.model(case.x)
    case.attach(setting, random=False)
    y = case.model(case.x)
    if (setting == "token_rows" and not case.kind.lookup) or setting == "orthogonal":
        # A product of some columns rounds as it likes.
        close(y, before, EPSILON[dtype])
    elif kind.startswith("mha"):  # torch has other kernels for weights that require a gradient
        close(y, before, EPSILON[dtype])
        for p in case.parameters("a").values():
            p.requires_grad_(False)
        assert torch.equal(case.model(case.x), before)
    else:
        assert torch.equal(y, before)
        with torch.no_grad():
            assert torch.equal(case.model(case.x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pairs()
def test_the_output_is_that_of_the_dense_formula(setting: str, kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, dtype)
    case.model.requires_grad_(False)
    base = case.model(case.x)
    case.attach(setting)
    expected = case.expected({"a": 1.0})
    y = case.model(case.x)
    assert y.dtype is dtype
    assert y.requires_grad
    close(y, expected, TOLERANCE[dtype])
    assert not torch.allclose(y, base)
    for training in (True, False):
        case.model.train(training)
        close(case.model(case.x), expected, TOLERANCE[dtype])
        with torch.no_grad():
            close(case.model(case.x), expected, TOLERANCE[dtype])
    with lk.use(case.model, None):
        assert torch.equal(case.model(case.x), base)


@pairs()
def test_gradients_are_those_of_the_dense_formula(setting: str, kind: str) -> None:
    case = Case(kind)
    case.attach(setting)
    own = case.parameters("a")
    trained = [name for name, p in own.items() if p.requires_grad]
    assert set(trained) == own.keys() - case.method("a").frozen
    x, inputs = case.x, []
    if x.is_floating_point():
        inputs = [x.requires_grad_()]
    y = case.model(x)
    G = case.cotangent(y)
    got = torch.autograd.grad((y * G).sum(), [*(own[name] for name in trained), *inputs])

    dense = {k: p.detach().double().clone().requires_grad_() for k, p in own.items()}
    expected_x = case.x.detach().clone()
    inputs = [expected_x.requires_grad_()] if expected_x.is_floating_point() else []
    reference = case.expected({"a": 1.0}, expected_x, {"a": dense})
    want = torch.autograd.grad((reference * G).sum(), [*(dense[name] for name in trained), *inputs])
    for actual, expected in zip(got, want, strict=True):
        close(actual, expected, 1e-10)
    assert all(g.abs().max() > 0 for g in got)


@pairs()
def test_only_the_adapter_is_trained(setting: str, kind: str) -> None:
    case = Case(kind)
    case.attach(setting)
    case.model(case.x).square().sum().backward()
    frozen = case.method("a").frozen
    trained = []
    for name, p in case.model.named_parameters():
        own = ".lorakit." in name and name.rsplit(".", 1)[-1] not in frozen
        assert (p.grad is not None) == p.requires_grad == own, name
        trained += [name] * own
    assert list(lk.trainable(case.model)) == trained


@pairs(settings=("lora", "lorabias", "dora", "full"), kinds=("linear", "conv2d-groups", "mha-in", "hfconv1d"))
def test_an_unfrozen_base_gets_its_own_gradients(setting: str, kind: str) -> None:
    """With ``freeze=False`` the base trains along: its gradients too are those of the dense formula."""
    case = Case(kind)
    case.attach(setting, freeze=False)
    module = case.model.get_submodule(case.kind.module)
    bias = "in_proj_bias" if kind == "mha-in" else "bias"
    y = case.model(case.x)
    G = case.cotangent(y)
    (got,) = torch.autograd.grad((y * G).sum(), module._parameters[bias])
    stock = case.stock.requires_grad_(True).get_submodule(case.kind.module)
    (want,) = torch.autograd.grad((case.expected({"a": 1.0}) * G).sum(), stock._parameters[bias])
    close(got, want, 1e-10)
