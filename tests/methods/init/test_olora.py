"""OLoRA: the start is the projection of the weight on its first columns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.targets import find
from tests.contracts.kinds import KINDS, Host

MATRICES = ["linear", "hfconv1d", "embedding", "conv2d", "conv2d-groups", "mha-in", "experts"]


@pytest.mark.parametrize("kind", MATRICES)
def test_the_start_projects_the_weight_on_its_first_columns(kind: str) -> None:
    torch.manual_seed(0)
    (target,) = find(KINDS[kind].build().double(), [KINDS[kind].names])
    p = lk.LoRA(r=2, alpha=3, init="olora").start(target, None, {})
    W, A, B = target.weight(), p["lora_A"], p["lora_B"]
    torch.testing.assert_close(B.mT @ B, torch.eye(2).double().expand_as(B.mT @ B), rtol=0, atol=1e-12)
    first = W[..., :2]
    torch.testing.assert_close(B @ A, first @ torch.linalg.pinv(first) @ W, rtol=0, atol=1e-12)
    assert (A.tril(-1) == 0).all(), "A is upper trapezoidal"
    assert torch.equal(p["start_A"], A)
    assert torch.equal(p["start_B"], B)


def test_the_weight_is_not_divided_by_the_scale() -> None:
    (target,) = find(Host(nn.Linear(6, 5)), ["layer"])
    one, two = (lk.LoRA(r=2, alpha=alpha, init="olora").start(target, None, {}) for alpha in (1, 7))
    assert torch.equal(one["lora_A"], two["lora_A"])


def test_a_half_precision_weight_is_decomposed_in_float32() -> None:
    model = Host(nn.Linear(30, 20)).bfloat16()
    (target,) = find(model, ["layer"])
    B = lk.LoRA(r=4, init="olora").start(target, None, {})["lora_B"]
    assert B.dtype is torch.float32
    torch.testing.assert_close(B.mT @ B, torch.eye(4), rtol=0, atol=1e-6)


def peft_started(stock: nn.Module, **config: Any) -> Any:
    import peft

    return peft.get_peft_model(
        copy.deepcopy(stock),
        peft.LoraConfig(target_modules=["layer"], r=2, lora_alpha=3, init_lora_weights="olora", **config),
    )


def test_it_is_that_of_peft_on_a_linear_layer() -> None:
    torch.manual_seed(0)
    stock = Host(nn.Linear(8, 6))
    theirs = peft_started(stock).base_model.model.layer
    lk.attach(stock, lk.LoRA(r=2, alpha=3, init="olora"), ["layer"])
    p = lk.extract(stock).tensors["layer"]
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    torch.testing.assert_close(p["lora_B"] @ p["lora_A"], product, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        stock.layer.weight - 1.5 * p["lora_B"] @ p["lora_A"], theirs.base_layer.weight, rtol=0, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore")
def test_peft_breaks_conv1d_and_we_do_not() -> None:
    """PEFT decomposes transformers' ``Conv1D`` as if it were not stored transposed.

    A square layer then starts at another model than the base, and any other layer cannot be started at all.
    """
    peft = pytest.importorskip("peft")
    x = torch.randn(5, 8)
    square, oblong = Host(Conv1D(8, 8)), Host(Conv1D(6, 8))
    for stock in (square, oblong):
        ours = copy.deepcopy(stock)
        lk.attach(ours, lk.LoRA(r=2, alpha=3, init="olora"), ["layer"])
        assert torch.equal(ours(x), stock(x))
    if peft.__version__ != "0.21.2":
        pytest.skip("the defect was found in PEFT 0.21.2")
    theirs = peft_started(square, fan_in_fan_out=True)
    assert (theirs(x) - square(x)).abs().max() > 1e-3 * square(x).abs().max()
    with pytest.raises(RuntimeError):
        peft_started(oblong, fan_in_fan_out=True)(x)
