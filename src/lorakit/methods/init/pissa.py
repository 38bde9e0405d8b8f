"""PiSSA: training starts from the principal singular triplets of the weight itself.

Source: Meng et al. 2024 (arXiv 2404.02948), equations 2 to 4, and section 4 for the fast decomposition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.target import Target
from lorakit.ops.truncated_svd import Triplets, leading_triplets, leading_triplets_by_projection


def pissa(target: Target, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """``B = U_r sqrt(S_r)`` and ``A = sqrt(S_r) V_rᵀ``: ``B A`` is the best approximation of ``W`` of rank r."""
    return _halves(leading_triplets(target.weight(), r))


def pissa_by_projection(
    target: Target, r: int, generator: torch.Generator | None, *, iterations: int
) -> tuple[Tensor, Tensor]:
    """The same by a random projection with so many iterations: for large weights."""
    return _halves(
        leading_triplets_by_projection(target.weight(), r, iterations=iterations, generator=generator)
    )


def _halves(triplets: Triplets) -> tuple[Tensor, Tensor]:
    root = triplets.S.sqrt()
    return root.unsqueeze(-1) * triplets.Vh, triplets.U * root.unsqueeze(-2)
