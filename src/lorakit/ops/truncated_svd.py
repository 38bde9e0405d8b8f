"""The leading singular triplets of a matrix or a stack of matrices, exactly or by random projection.

Both work in at least float32. The random method is the subspace iteration of Halko, Martinsson and Tropp 2011
(SIAM Review 53, algorithm 4.4): a random block is multiplied by the matrix and its transpose in turn, orthonormalised
after each product, and the matrix is decomposed in the subspace that is found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.ops.precision import own_precision

# Extra columns of the random block: with a few of them the wanted directions come out far more sharply.
_OVERSAMPLING = 8


class Triplets(NamedTuple):
    """``W ~ U diag(S) Vh``, singular values descending.

    Attributes:
        U: Left singular vectors, ``(*batch, out, r)``.
        S: Singular values, ``(*batch, r)``.
        Vh: Right singular vectors as rows, ``(*batch, r, in)``.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


def leading_triplets(W: Tensor, r: int) -> Triplets:
    """The first ``r`` singular triplets by a full decomposition: the best rank-r approximation there is.

    Args:
        W: ``(*batch, out, in)``.
        r: At most the smaller of ``out`` and ``in``.
    """
    with own_precision(W):
        U, S, Vh = torch.linalg.svd(_wide(W), full_matrices=False)
    return Triplets(U[..., :r], S[..., :r], Vh[..., :r, :])


def leading_triplets_by_projection(
    W: Tensor, r: int, *, iterations: int = 4, generator: torch.Generator | None = None
) -> Triplets:
    """The first ``r`` singular triplets, nearly: a few products with a block of ``r + 8`` columns.

    The error falls with ``(s_{r+9} / s_r) ** (2 * iterations + 1)``. Where the block would be as wide as the matrix the
    decomposition is exact.

    Args:
        W: ``(*batch, out, in)``.
        r: At most the smaller of ``out`` and ``in``.
        iterations: How often the block is multiplied by ``W Wᵀ``.
        generator: Draws the random block, on the CPU.
    """
    width = r + _OVERSAMPLING
    if width >= min(W.shape[-2:]):
        return leading_triplets(W, r)
    W = _wide(W)
    block = torch.randn(*W.shape[:-2], W.shape[-1], width, generator=generator, dtype=W.dtype).to(W.device)
    with own_precision(W):
        Q = torch.linalg.qr(W @ block).Q
        for _ in range(iterations):
            Q = torch.linalg.qr(W.mT @ Q).Q
            Q = torch.linalg.qr(W @ Q).Q
        U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
        U = Q @ U
    return Triplets(U[..., :r], S[..., :r], Vh[..., :r, :])


def _wide(W: Tensor) -> Tensor:
    return W.to(torch.promote_types(W.dtype, torch.float32))
