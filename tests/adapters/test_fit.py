"""How many directions are kept, and what the others hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.adapters.fit import Cut, Fitted, Residual, energy_rank, split
from lorakit.errors import ConfigError
from lorakit.ops.truncated_svd import leading_triplets
from tests.adapters.states import loras


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.floats(0.01, 1))
def test_the_rank_of_an_energy_is_the_least(values: list[float], energy: float) -> None:
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    total = float(S.square().sum())
    k = energy_rank(S, energy)
    assert 1 <= k <= len(values)
    assert float(S[:k].square().sum()) >= energy * total * (1 - 1e-9)
    assert k == 1 or float(S[: k - 1].square().sum()) < energy * total * (1 + 1e-9)


def test_a_number_and_a_share_together_keep_the_smaller() -> None:
    S = torch.tensor([3.0, 2.0, 1.0])
    assert [Cut(r=2).rank(S), Cut(energy=1.0).rank(S), Cut(2, 1.0).rank(S), Cut(2, 0.5).rank(S)] == [
        2,
        3,
        2,
        1,
    ]
    assert Cut(r=9).rank(S) == 3
    assert not Cut()
    for settings in ({"r": 0}, {"r": True}, {"energy": 0.0}, {"energy": 1.1}):
        with pytest.raises(ConfigError):
            Cut(**settings)  # type: ignore[arg-type]


def test_factors_are_balanced() -> None:
    W = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A, B, residual = split(leading_triplets(W, 5), 3)
    S = torch.linalg.svdvals(W)
    torch.testing.assert_close(A.norm(dim=1), S[:3].sqrt())
    torch.testing.assert_close(B.norm(dim=0), S[:3].sqrt())
    assert residual.error == pytest.approx(float(S[3:].norm() / S.norm()))


def test_errors_over_targets_add_up_as_squares() -> None:
    found = Fitted(
        loras()[0], {"a": Residual(1, 3.0, 1.0), "b": Residual(1, 4.0, 2.0), "c": Residual(1, 0.0, 0.0)}
    )
    assert found.error == pytest.approx(5**0.5 / 5)
    assert found.worst == ("b", 0.5)
    assert isinstance(found.state, lk.AdapterState)
