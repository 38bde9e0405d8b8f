"""Leading singular triplets: the best approximation, or nearly that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.ops.truncated_svd import Triplets, leading_triplets, leading_triplets_by_projection


def decaying(*batch: int, out: int = 60, in_: int = 50, rate: float = 0.8) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(*batch, out, in_, generator=draw, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(*batch, in_, in_, generator=draw, dtype=torch.float64))
    return U * rate ** torch.arange(in_, dtype=torch.float64) @ V.mT


def product(t: Triplets) -> Tensor:
    return t.U * t.S.unsqueeze(-2) @ t.Vh


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_the_error_is_the_first_singular_value_left_out(batch: tuple[int, ...]) -> None:
    W = decaying(*batch)
    exact = leading_triplets(W, 7)
    norms = torch.linalg.matrix_norm(W - product(exact), ord=2)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.8**7), rtol=1e-10, atol=0)
    near = leading_triplets_by_projection(W, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(near.S, exact.S, rtol=1e-6, atol=0)
    torch.testing.assert_close(product(near), product(exact), rtol=0, atol=1e-4)


def test_more_iterations_come_nearer() -> None:
    W = decaying(rate=0.97)
    best = product(leading_triplets(W, 5))
    errors = [
        float(
            (
                product(
                    leading_triplets_by_projection(
                        W, 5, iterations=n, generator=torch.Generator().manual_seed(1)
                    )
                )
                - best
            ).norm()
        )
        for n in (0, 2, 20)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_the_vectors_are_orthonormal() -> None:
    for found in (
        leading_triplets(decaying(), 6),
        leading_triplets_by_projection(decaying(), 6, generator=torch.Generator().manual_seed(0)),
    ):
        eye = torch.eye(6, dtype=torch.float64)
        torch.testing.assert_close(found.U.mT @ found.U, eye, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.Vh @ found.Vh.mT, eye, rtol=0, atol=1e-12)


def test_a_block_as_wide_as_the_matrix_is_exact() -> None:
    W = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    near, exact = leading_triplets_by_projection(W, 4), leading_triplets(W, 4)
    assert all(torch.equal(a, b) for a, b in zip(near, exact, strict=True))


def test_a_seed_gives_the_same_numbers_and_none_leaves_the_others_alone() -> None:
    W = decaying(rate=0.99)
    one, two, other = (
        leading_triplets_by_projection(W, 5, iterations=1, generator=torch.Generator().manual_seed(s))
        for s in (3, 3, 4)
    )
    assert torch.equal(one.Vh, two.Vh)
    assert not torch.equal(one.Vh, other.Vh)


def test_half_precision_is_decomposed_in_float32() -> None:
    W = decaying().to(torch.bfloat16)
    for found in (leading_triplets(W, 3), leading_triplets_by_projection(W, 3)):
        assert {t.dtype for t in found} == {torch.float32}
        torch.testing.assert_close(found.S, torch.linalg.svdvals(W.float())[:3], rtol=1e-4, atol=0)
