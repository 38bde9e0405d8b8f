"""Linear layers and transformers' transposed ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.targets import LinearTarget, TransposedLinearTarget, find
from tests.contracts.kinds import Host
from tests.contracts.pairs import close


@pytest.mark.parametrize(
    ("layer", "kind"),
    [(nn.Linear(4, 6), LinearTarget), (Conv1D(6, 4), TransposedLinearTarget)],
    ids=["linear", "conv1d"],
)
def test_apply_and_add_low_rank_are_what_the_layer_computes(layer: nn.Module, kind: type) -> None:
    layer = copy.deepcopy(layer).double()
    (target,) = find(Host(layer), ["layer"])
    assert type(target) is kind
    assert (target.out, target.in_, target.batch) == (6, 4, ())
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    y = layer(x).detach()
    close(target.add_bias(target.apply(x, target.weight())), y, 1e-14)
    A, B = torch.randn(2, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    close(target.add_low_rank(y.clone(), x, A, B, 0.5, 0.0) - y, 0.5 * target.apply(x, B @ A), 1e-13)
    k = torch.randn(6, dtype=torch.float64)
    close(target.scale_out(y, k), y * k, 0)
    W1, W2 = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    close(target.apply_kronecker(x, W1, W2), target.apply(x, torch.kron(W1, W2)), 1e-13)


def test_subclasses_that_keep_the_forward_are_hooked() -> None:
    class Named(nn.Linear):
        pass

    (target,) = find(Host(Named(3, 3)), ["layer"])
    assert target.binding == "forward"


def test_a_forward_of_its_own_binds_the_weight() -> None:
    class Squared(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).square()

    torch.manual_seed(0)
    model = Host(Squared(3, 3)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    (target,) = find(model, ["layer"])
    assert target.binding == "parameter"
    lk.attach(model, lk.LoRA(r=2), ["layer"], name="a", dtype=torch.float64)
    A, B = (p for n, p in model.named_parameters() if "lorakit" in n)
    with torch.no_grad():
        B.normal_()
    W = model.layer._parameters["weight"] + 8 * B @ A
    close(model(x), (x @ W.T + model.layer.bias).square(), 1e-13)
    lk.detach(model)
    assert type(model.layer) is Squared


def test_a_layer_with_no_rows_or_one_token() -> None:
    model = Host(nn.Linear(4, 6))
    lk.attach(model, lk.LoRA(r=2), ["layer"])
    for size in ((0, 4), (2, 0, 4), (4,), (1, 1, 4)):
        assert model(torch.randn(size)).shape == (*size[:-1], 6)
        with torch.no_grad():
            assert model(torch.randn(size)).shape == (*size[:-1], 6)
