"""TIES and DARE on the true change."""

from __future__ import annotations

import pytest
import torch

from lorakit.adapters import combine
from lorakit.adapters.consensus import dropped, elected_mean, trimmed
from tests.adapters.states import change, loras

WEIGHTS = [0.7, -0.4, 1.5]


def parts() -> list[torch.Tensor]:
    return [w * change(s) for w, s in zip(WEIGHTS, loras(), strict=True)]


def test_trimming_keeps_the_largest() -> None:
    x = torch.tensor([[0.1, -5.0, 2.0], [3.0, 0.0, -1.0]])
    assert torch.equal(trimmed(x, 0.5), torch.tensor([[0.0, -5.0, 2.0], [3.0, 0.0, 0.0]]))
    assert trimmed(x, 1.0) is x
    assert int((trimmed(x, 1e-9) != 0).sum()) == 1


def test_election_by_hand() -> None:
    """Column 0: signs agree. 1: the larger wins. 2: a zero has no vote. 3: votes cancel, most entries are positive."""
    stacked = [torch.tensor([1.0, 3.0, 0.0, 2.0]), torch.tensor([3.0, -1.0, 5.0, -2.0])]
    assert torch.equal(elected_mean(stacked), torch.tensor([2.0, 3.0, 5.0, 2.0]))
    assert torch.equal(elected_mean([torch.zeros(2), torch.zeros(2)]), torch.zeros(2))


@pytest.mark.parametrize("how", ["dare_linear", "magnitude_prune"])
def test_with_density_one_it_is_the_sum(how: str) -> None:
    made = combine(loras(), WEIGHTS, how, density=1.0, r=7)
    exact = sum(parts())
    assert (change(made.state) - exact).norm() < 1e-12 * exact.norm()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("how", ["ties", "dare_ties"])
def test_with_density_one_it_is_the_mean_of_what_agrees(how: str) -> None:
    stacked = torch.stack(parts())
    sign = stacked.sum(0).sign()
    agree = stacked.sign() == sign
    exact = (stacked * agree).sum(0) / agree.sum(0)
    made = combine(loras(), WEIGHTS, how, density=1.0, r=7)
    assert (change(made.state) - exact).norm() < 1e-12 * exact.norm()
    same = combine([loras()[0]] * 3, None, how, density=1.0, r=7)
    assert (change(same.state) - change(loras()[0])).norm() < 1e-12 * change(loras()[0]).norm()


def test_the_mean_of_dare_over_seeds_is_the_sum() -> None:
    exact = sum(parts())
    errors = []
    for count in (20, 320):
        made = [
            change(combine(loras(), WEIGHTS, "dare_linear", density=0.5, r=7, seed=n).state)
            for n in range(count)
        ]
        errors.append(float((torch.stack(made).mean(0) - exact).norm() / exact.norm()))  # type: ignore[union-attr]
    assert errors[1] < 0.08
    assert errors[1] < errors[0] / 2  # sixteen times the seeds: a quarter of the error


def test_a_seed_draws_the_same_again_and_another_seed_something_else() -> None:
    a, b, c = (
        change(combine(loras(), None, "dare_linear", density=0.5, r=7, seed=seed).state) for seed in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)
    x = torch.ones(1000)
    kept = dropped(x, 0.25, torch.Generator().manual_seed(0))
    assert set(kept.tolist()) == {0.0, 4.0}
    assert 200 < int((kept != 0).sum()) < 300


def test_the_error_that_a_cut_adds_is_told() -> None:
    made = combine(loras(), WEIGHTS, "magnitude_prune", density=0.5, r=2)
    dense = sum(trimmed(part / w, 0.5) * w for part, w in zip(parts(), WEIGHTS, strict=True))
    tail = torch.linalg.svdvals(dense)[2:].norm().item()  # type: ignore[arg-type]
    assert made.residuals["q"].lost == pytest.approx(tail)
    assert (change(made.state) - dense).norm().item() == pytest.approx(tail)
