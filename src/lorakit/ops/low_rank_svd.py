"""The singular value decomposition of a product ``B A`` of thin factors, without forming the product.

With ``B = Q_B R_B`` and ``Aᵀ = Q_A R_A`` the product is ``Q_B (R_B R_Aᵀ) Q_Aᵀ``, and the matrix in the middle is as
small as the rank. The cost is ``O((out + in) r²)`` instead of ``O(out in min(out, in))``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.ops.precision import own_precision
from lorakit.ops.truncated_svd import Triplets


def low_rank_svd(A: Tensor, B: Tensor) -> Triplets:
    """All singular triplets of ``B A`` that can be other than zero: at most ``min(r, out, in)``.

    Args:
        A: ``(*batch, r, in)``.
        B: ``(*batch, out, r)``, of the same dtype, which is that of the computation: in float64 it agrees with the
            decomposition of the dense product to 2e-13.
    """
    with own_precision(A):
        Q_B, R_B = torch.linalg.qr(B)
        Q_A, R_A = torch.linalg.qr(A.mT)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
        return Triplets(Q_B @ U, S, Vh @ Q_A.mT)


def low_rank_core(A: Tensor, B: Tensor) -> Tensor:
    """``R_B R_Aᵀ``, ``(*batch, min(out, r), min(in, r))``: a small matrix with the singular values of ``B A``.

    Args:
        A: ``(*batch, r, in)``.
        B: ``(*batch, out, r)``, of the same dtype.
    """
    with own_precision(A):
        return torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT


def low_rank_norm(A: Tensor, B: Tensor) -> Tensor:
    """The Frobenius norm of ``B A``, of a whole stack; a small difference of large changes keeps its digits.

    Args:
        A: ``(*batch, r, in)``.
        B: ``(*batch, out, r)``.
    """
    return low_rank_core(A, B).norm()


def low_rank_inner(A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
    """The sum of the products of the entries of ``B1 A1`` and ``B2 A2``, ``tr((B1 A1)ᵀ B2 A2)``, of a whole stack."""
    with own_precision(A1):
        return ((B1.mT @ B2) * (A1 @ A2.mT)).sum()
