"""The usual start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.methods.init.kaiming import kaiming
from lorakit.targets import find
from tests.contracts.kinds import KINDS, Host


def test_its_distribution_is_uniform_within_one_over_the_root_of_in() -> None:
    (target,) = find(Host(nn.Linear(100, 50)), ["layer"])
    A, B = kaiming(target, 40, torch.Generator().manual_seed(0))
    assert A.shape == (40, 100)
    assert float(A.abs().max()) <= 0.1
    assert float(A.abs().max()) > 0.0995
    assert abs(float(A.std()) - 0.1 / 3**0.5) < 0.001
    assert torch.equal(B, torch.zeros(50, 40))


def test_it_is_that_of_torch_for_a_linear_layer() -> None:
    """``nn.init.kaiming_uniform_(a=sqrt(5))`` draws from the same interval: the same numbers."""
    (target,) = find(Host(nn.Linear(16, 8)), ["layer"])
    A, _ = kaiming(target, 4, torch.Generator().manual_seed(0))
    expected = nn.init.kaiming_uniform_(
        torch.empty(4, 16), a=5**0.5, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(A, expected)


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if not v.whole and v.adapts == "layer"])
def test_the_change_starts_at_zero(kind: str) -> None:
    (target,) = find(KINDS[kind].build(), [KINDS[kind].names])
    A, B = kaiming(target, 2, None)
    assert ((B @ A) == 0).all()
    moved = B if target.shape.lookup else A
    assert (moved != 0).all(), "one factor is not zero, or nothing would ever be trained"


def test_an_embedding_starts_the_other_way_round() -> None:
    (target,) = find(Host(nn.Embedding(200, 60)), ["layer"])
    A, B = kaiming(target, 8, torch.Generator().manual_seed(0))
    assert torch.equal(A, torch.zeros(8, 200))
    assert B.shape == (60, 8)
    assert abs(float(B.std()) - 1) < 0.1
