"""The paper's start."""

from __future__ import annotations

import torch
from torch import nn

from lorakit.methods.init.gaussian import gaussian
from lorakit.targets import find
from tests.contracts.kinds import Experts, Host


def test_its_standard_deviation_is_one_over_r() -> None:
    (target,) = find(Host(nn.Linear(400, 50)), ["layer"])
    A, B = gaussian(target, 40, torch.Generator().manual_seed(0))
    assert abs(float(A.std()) * 40 - 1) < 0.02
    assert abs(float(A.mean())) < 5 * (1 / 40) / A.numel() ** 0.5
    assert torch.equal(B, torch.zeros(50, 40))


def test_each_matrix_of_a_stack_has_its_own_numbers() -> None:
    (target,) = find(Host(Experts()), ["up"])
    A, B = gaussian(target, 2, torch.Generator().manual_seed(0))
    assert A.shape == (3, 2, 6)
    assert B.shape == (3, 8, 2)
    assert not torch.equal(A[0], A[1])


def test_an_embedding_starts_the_other_way_round() -> None:
    (target,) = find(Host(nn.Embedding(9, 6)), ["layer"])
    A, B = gaussian(target, 2, None)
    assert (A == 0).all()
    assert (B != 0).all()
