"""Row norms of ``W + s B A`` without forming the product.

``|W_j + s (BA)_j|² = |W_j|² + 2 s B_j · (W Aᵀ)_j + s² B_j (A Aᵀ) B_jᵀ``: the cost is one ``out x in x r``
product instead of an ``out x in`` temporary for ``BA`` and another for the sum. While ``W`` is frozen its own squares
need not be summed again.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_norms(
    W: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    *,
    squares: Tensor | None = None,
    least: float = 0.0,
) -> Tensor:
    """Euclidean norms of the rows of ``W + scale * B A``.

    The sum of squares is accumulated in at least float32; where cancellation leaves a tiny negative number
    the norm is 0.

    Args:
        W: Base weight, ``(*batch, out, in)``.
        A: ``(*batch, r, in)``.
        B: ``(*batch, out, r)``.
        scale: The scaling of the product.
        squares: ``row_squares(W)``, if it is known.
        least: Smaller norms are raised to this one, and have no gradient.

    Returns:
        Norms, ``(*batch, out)``, in the wider of float32 and the dtype of ``W``.
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    W, A, B = W.to(dtype), A.to(dtype), B.to(dtype) * scale
    own = row_squares(W) if squares is None else squares
    squares = own + torch.linalg.vecdot(B, 2 * (W @ A.mT) + B @ (A @ A.mT))
    return squares.clamp_min(least**2).sqrt()


def row_squares(W: Tensor) -> Tensor:
    """The sum of the squares of each row of ``W`` ``(*batch, out, in)``, in at least float32."""
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    return torch.linalg.vector_norm(W, dim=-1).square()  # a third of the time of vecdot, which forms W * W
