"""The orthogonal start: two factors that are not zero, and a product that is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.methods.init.orthogonal import orthogonal
from lorakit.targets import find
from tests.contracts.kinds import KINDS, Host


@pytest.mark.parametrize("kind", ["linear", "hfconv1d", "embedding", "conv2d-groups", "mha-in", "experts"])
def test_the_product_is_zero_and_the_factors_are_not(kind: str) -> None:
    (target,) = find(KINDS[kind].build(), [KINDS[kind].names])
    A, B = orthogonal(target, 2, torch.Generator().manual_seed(0))
    assert A.shape == (*target.batch, 2, target.in_)
    assert B.shape == (*target.batch, target.out, 2)
    assert (B @ A).abs().max() < 1e-16
    assert A.abs().min(-1).values.max() > 0
    assert B.abs().min(-2).values.max() > 0


def test_each_factor_has_half_of_the_rank() -> None:
    (target,) = find(Host(nn.Linear(200, 100)), ["layer"])
    A, B = orthogonal(target, 8, torch.Generator().manual_seed(0))
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 4
    for factor in (A, B):  # a tenth, times the root of the half of a unit vector
        assert float(factor.std()) == pytest.approx(0.1 * 0.5**0.5, rel=0.15)


def test_both_factors_learn_from_the_first_step_on() -> None:
    torch.manual_seed(0)
    model = Host(nn.Linear(8, 6))
    before = model(x := torch.randn(4, 8))
    lk.attach(model, lk.LoRA(r=4, init="orthogonal"), ["layer"])
    y = model(x)
    torch.testing.assert_close(y, before, rtol=1e-6, atol=1e-6)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in lk.trainable(model).values())


def test_an_odd_rank_is_refused() -> None:
    model = Host(nn.Linear(8, 6))
    with pytest.raises(ConfigError, match=r"must be even; 'layer' has r=3"):
        lk.attach(model, lk.LoRA(r=3, init="orthogonal"), ["layer"])
    lk.attach(model, lk.LoRA(r=3, init="orthogonal", rank_pattern={"layer": 2}), ["layer"])


def test_it_is_built_as_in_peft() -> None:
    """The same spaces: rows of A and columns of B span half of the rank each, at the same size."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    stock = Host(nn.Linear(400, 300))
    theirs = peft.get_peft_model(
        copy.deepcopy(stock), peft.LoraConfig(target_modules=["layer"], r=8, init_lora_weights="orthogonal")
    ).base_model.model.layer
    (target,) = find(stock, ["layer"])
    A, B = orthogonal(target, 8, None)
    for ours, other in (
        (A, theirs.lora_A["default"].weight.detach()),
        (B, theirs.lora_B["default"].weight.detach()),
    ):
        assert float(ours.std()) == pytest.approx(float(other.std()), rel=0.3)
        assert torch.linalg.matrix_rank(other, atol=1e-4) == torch.linalg.matrix_rank(ours) == 4
