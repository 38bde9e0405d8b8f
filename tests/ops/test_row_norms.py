"""Row norms without the product against row norms of the product."""

from __future__ import annotations

import pytest
import torch

from lorakit.ops import row_norms


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=["matrix", "stack", "stacks"])
@pytest.mark.parametrize("scale", [1.0, -2.5, 0.0])
def test_they_are_the_norms_of_the_sum(batch: tuple[int, ...], scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    W, A, B = (
        torch.randn(*batch, *size, generator=draw, dtype=torch.float64) for size in ((7, 9), (3, 9), (7, 3))
    )
    expected = (W + scale * (B @ A)).norm(dim=-1)
    torch.testing.assert_close(row_norms(W, A, B, scale), expected, rtol=1e-14, atol=1e-14)


def test_a_zero_factor_leaves_the_norms_of_the_base_bit_for_bit() -> None:
    W, A = torch.randn(7, 9), torch.randn(3, 9)
    assert torch.equal(row_norms(W, A, torch.zeros(7, 3)), row_norms(W, torch.zeros(3, 9), torch.randn(7, 3)))


def test_half_precision_is_summed_in_float32() -> None:
    W = torch.full((2, 4096), 0.1, dtype=torch.bfloat16)
    norms = row_norms(W, torch.zeros(1, 4096, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16))
    assert norms.dtype is torch.float32
    torch.testing.assert_close(norms, W.float().norm(dim=-1), rtol=1e-5, atol=0)


def test_a_change_that_cancels_the_base_gives_zero_and_not_nan() -> None:
    draw = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 50, generator=draw), torch.randn(20, 2, generator=draw)
    norms = row_norms(-(B @ A), A, B)
    assert torch.isfinite(norms).all()
    assert float(norms.max()) < 1e-2 * float((B @ A).norm(dim=-1).max())


def test_a_wider_base_decides_the_dtype() -> None:
    W, A, B = torch.randn(4, 5).double(), torch.randn(2, 5), torch.randn(4, 2)
    assert row_norms(W, A, B).dtype is torch.float64
