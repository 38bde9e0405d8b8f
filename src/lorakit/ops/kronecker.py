"""The Kronecker product of stacks of matrices, and its product with vectors without forming it.

``(W1 ⊗ W2) vec(X)`` is ``vec(W1 X W2ᵀ)`` for a vector read row by row as a matrix ``X``: two small products in place of
one with ``out x in`` numbers, which need not even exist.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def kronecker(W1: Tensor, W2: Tensor) -> Tensor:
    """``W1 ⊗ W2`` for each index of the leading dimensions.

    Args:
        W1: ``(*batch, a, c)``.
        W2: ``(*batch, b, d)``.

    Returns:
        ``(*batch, a b, c d)``.
    """
    product = W1[..., :, None, :, None] * W2[..., None, :, None, :]
    return product.flatten(-2).flatten(-3, -2)


def kronecker_linear(x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """``x (W1 ⊗ W2)ᵀ`` in the cheaper of the two orders.

    Args:
        x: ``(..., c d)``.
        W1: ``(a, c)``.
        W2: ``(b, d)``.

    Returns:
        ``(..., a b)``.
    """
    (a, c), (b, d) = W1.shape, W2.shape
    X = x.unflatten(-1, (c, d))
    if c * b * (d + a) < a * d * (c + b):
        return F.linear(F.linear(X, W2).mT, W1).mT.flatten(-2)
    return F.linear(F.linear(X.mT, W1).mT, W2).flatten(-2)
