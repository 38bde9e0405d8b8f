"""The decomposition of a product from its factors."""

from __future__ import annotations

import pytest
import torch

from lorakit.ops.low_rank_svd import low_rank_inner, low_rank_norm, low_rank_svd


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize(("out", "r", "in_"), [(30, 4, 20), (5, 8, 20), (20, 8, 5), (3, 9, 3), (6, 1, 6)])
def test_agrees_with_the_dense_product(batch: tuple[int, ...], out: int, r: int, in_: int) -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(*batch, r, in_, generator=generator, dtype=torch.float64)
    B = torch.randn(*batch, out, r, generator=generator, dtype=torch.float64)
    U, S, Vh = low_rank_svd(A, B)
    k = min(r, out, in_)
    assert S.shape == (*batch, k)
    dense = B @ A
    scale = dense.norm()
    assert (torch.linalg.svdvals(dense)[..., :k] - S).abs().max() < 2e-13 * scale
    assert (U * S.unsqueeze(-2) @ Vh - dense).abs().max() < 2e-13 * scale
    eye = torch.eye(k, dtype=torch.float64)
    assert (U.mT @ U - eye).abs().max() < 1e-13
    assert (Vh @ Vh.mT - eye).abs().max() < 1e-13
    assert low_rank_norm(A, B).item() == pytest.approx(scale.item(), rel=1e-13)
    other = torch.randn_like(dense)
    inner = low_rank_inner(A, B, other, torch.eye(out, dtype=torch.float64).expand(*batch, out, out))
    assert inner.item() == pytest.approx((dense * other).sum().item(), rel=1e-10)
