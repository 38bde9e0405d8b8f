"""The four functions of the storage of ordinary weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.targets import DenseStorage

STORAGE = DenseStorage()


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2, dtype=torch.bfloat16)


def test_load_is_the_value_without_its_history(layer: nn.Linear) -> None:
    value = STORAGE.load(layer, "weight")
    assert torch.equal(value, layer.weight)
    assert not value.requires_grad
    assert value.data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize("flag", [True, False])
def test_store_rounds_once_and_keeps_dtype_and_flag(layer: nn.Linear, flag: bool) -> None:
    layer.requires_grad_(flag)
    value = torch.randn(2, 3, dtype=torch.float64)
    STORAGE.store(layer, "weight", value)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.dtype is torch.bfloat16
    assert layer.weight.requires_grad is flag
    assert torch.equal(layer.weight, value.to(torch.bfloat16))


def test_store_leaves_the_old_tensor_to_whoever_shares_it(layer: nn.Linear) -> None:
    tied = nn.Linear(3, 2, dtype=torch.bfloat16)
    tied.weight = layer.weight
    before = layer.weight.detach().clone()
    STORAGE.store(layer, "weight", torch.zeros(2, 3))
    assert torch.equal(tied.weight, before)
    assert tied.weight is not layer.weight


def test_store_takes_a_copy(layer: nn.Linear) -> None:
    value = torch.randn(2, 3, dtype=torch.bfloat16)
    STORAGE.store(layer, "weight", value)
    value.zero_()
    assert layer.weight.abs().max() > 0


def test_store_makes_a_transposed_view_contiguous(layer: nn.Linear) -> None:
    STORAGE.store(layer, "weight", torch.randn(3, 2, dtype=torch.bfloat16).mT)
    assert layer.weight.is_contiguous()


def test_restore_puts_back_the_object_and_with_it_the_tie(layer: nn.Linear) -> None:
    tied = nn.Linear(3, 2, dtype=torch.bfloat16)
    tied.weight = layer.weight
    snapshot = STORAGE.snapshot(layer, "weight")
    STORAGE.store(layer, "weight", torch.zeros(2, 3))
    STORAGE.restore(layer, "weight", snapshot)
    assert layer.weight is tied.weight is snapshot


def test_restore_follows_a_cast(layer: nn.Linear) -> None:
    before = layer.weight.detach().clone()
    snapshot = STORAGE.snapshot(layer, "weight")
    STORAGE.store(layer, "weight", torch.zeros(2, 3))
    layer.double()
    STORAGE.restore(layer, "weight", snapshot)
    assert layer.weight.dtype is torch.float64
    assert torch.equal(layer.weight, before.double())
