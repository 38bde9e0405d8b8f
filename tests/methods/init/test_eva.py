"""EVA's mathematics: components batch by batch against those of everything at once, and sharing out ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.methods.init.eva import Components, eva, share_out


def activations(count: int, width: int = 40, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose variance falls off along random directions, around a mean that is not zero."""
    draw = torch.Generator().manual_seed(5)
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))
    mean = torch.randn(width, generator=draw, dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=draw, dtype=torch.float64) * 0.8 ** torch.arange(width)
    return (rows @ basis.T + mean).to(dtype)


def exact(rows: Tensor, r: int, centred: bool) -> tuple[Tensor, Tensor]:
    """The leading directions of all rows at once, and the shares of variance that they explain."""
    rows = rows.double()
    rows = rows - rows.mean(0) if centred else rows
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    return Vh[:r], S[:r].square() / rows.square().sum()


def largest_angle(one: Tensor, two: Tensor) -> float:
    """Between two subspaces, each given by orthonormal rows; exact for small angles."""
    residual = one.double() - one.double() @ two.double().mT @ two.double()
    return float(torch.linalg.matrix_norm(residual, ord=2).clamp(max=1).asin())


def seen(rows: Tensor, batch: int, wanted: int, centred: bool = True) -> Components:
    found = Components(wanted, centred=centred)
    for part in rows.split(batch):
        found = found.updated(part, torch.Generator().manual_seed(0))
    return found


@pytest.mark.parametrize("centred", [True, False], ids=["pca", "svd"])
@pytest.mark.parametrize("batch", [400, 64, 23])
def test_batch_by_batch_is_near_all_at_once(centred: bool, batch: int) -> None:
    rows = activations(400)
    found = seen(rows, batch, 6, centred)
    directions, ratios = exact(rows, 6, centred)
    assert found.directions is not None
    assert largest_angle(found.directions[:6], directions) < 1e-3
    torch.testing.assert_close(found.ratios, ratios, rtol=1e-3, atol=0)
    assert found.count == 400


def test_taking_the_mean_out_makes_a_difference() -> None:
    rows = activations(400)
    pca, svd = seen(rows, 100, 3), seen(rows, 100, 3, centred=False)
    assert pca.mean is not None
    torch.testing.assert_close(pca.mean, rows.mean(0), rtol=0, atol=1e-5)
    assert pca.directions is not None
    assert svd.directions is not None
    assert largest_angle(pca.directions[:3], svd.directions[:3]) > 0.1


def test_a_start_has_orthonormal_rows_and_a_zero_factor() -> None:
    found = seen(activations(300), 50, 8)
    for r in (1, 5, 8):
        A, B = eva(found, 7, r)
        torch.testing.assert_close(A @ A.mT, torch.eye(r), rtol=0, atol=1e-5)
        assert torch.equal(B, torch.zeros(7, r))


def test_float64_stays_float64() -> None:
    rows = activations(300, dtype=torch.float64)
    found = seen(rows, 100, 4)
    assert found.directions is not None
    assert found.directions.dtype is torch.float64
    assert largest_angle(found.directions[:4], exact(rows, 4, True)[0]) < 1e-4
    assert seen(rows.bfloat16(), 100, 4).directions.dtype is torch.float32  # type: ignore[union-attr]


def test_it_settles_on_data_that_repeats_and_not_on_noise() -> None:
    rows = activations(64)
    found = seen(rows.repeat(3, 1), 64, 4)
    assert found.settled(4, 0.999)
    once = seen(rows, 64, 4)
    assert not once.settled(1, 0.0), "nothing has been compared yet"
    noise = torch.randn(96, 40, generator=torch.Generator().manual_seed(0))
    assert not seen(noise, 32, 8).settled(8, 0.99)


def test_few_rows_give_few_directions() -> None:
    found = seen(activations(3), 3, 8)
    assert found.directions is not None
    assert len(found.ratios) == len(found.directions) == 3
    assert found.updated(torch.zeros(0, 40)) is found


# ---- ranks
def shares(**values: list[float]) -> dict[str, Tensor]:
    return {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}


def test_ranks_go_where_the_variance_is() -> None:
    ratios = shares(a=[0.9, 0.05, 0.01, 0.001], b=[0.3, 0.2, 0.1, 0.08], c=[0.04, 0.03, 0.02, 0.02])
    assert share_out(ratios, 6) == {"a": 2, "b": 4, "c": 0}
    assert share_out(ratios, 7) == {"a": 2, "b": 4, "c": 1}


@pytest.mark.parametrize("budget", [1, 6, 11, 24])
def test_the_ranks_add_up_to_the_budget_and_none_is_above_its_limit(budget: int) -> None:
    draw = torch.Generator().manual_seed(budget)
    ratios = {
        f"{i}": torch.rand(8, generator=draw, dtype=torch.float64).sort(descending=True).values
        for i in range(3)
    }
    ranks = share_out(ratios, budget)
    assert sum(ranks.values()) == budget
    assert max(ranks.values()) <= 8


def test_no_room_to_move_leaves_every_rank() -> None:
    ratios = shares(a=[0.9, 0.8], b=[1e-9, 1e-12], c=[0.1, 0.0])
    assert share_out(ratios, 6) == {"a": 2, "b": 2, "c": 2}


def test_of_equal_components_the_earlier_layer_wins() -> None:
    assert share_out(shares(q=[0.5, 0.1], k=[0.5, 0.1], v=[0.5, 0.1]), 4) == {"q": 2, "k": 1, "v": 1}
