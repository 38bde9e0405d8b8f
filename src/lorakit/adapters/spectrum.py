"""The singular values of a low-rank change, from its factors alone.

With ``B = Q_B R_B`` and ``Aᵀ = Q_A R_A`` the singular values of ``s B A`` are those of the r x r matrix ``s
R_B R_Aᵀ``:
the out x in product is never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lorakit.core import AdapterState, LowRankMethod


@dataclass(frozen=True)
class Spectrum:
    """The singular values of the change at one target.

    Attributes:
        values: Descending, float64; ``(r,)``, or ``(*batch, r)`` for a stack of matrices.
    """

    values: Tensor

    @property
    def top(self) -> float:
        """The largest: the spectral norm of the change."""
        return float(self.values.max())

    @property
    def frobenius(self) -> float:
        """The Frobenius norm of the change, of the whole stack."""
        return float(self.values.square().sum().sqrt())

    @cached_property
    def effective_rank(self) -> float:
        """``exp`` of the entropy of the normalised singular values: 1 for one direction, r for r equal ones.

        The mean over a stack; 0 where there is no change. Source: Roy and Vetterli 2007.
        """
        rows = self.values.reshape(-1, self.values.shape[-1])
        ranks = []
        for row in rows:
            total = float(row.sum())
            shares = [float(v) / total for v in row if v > 0] if total > 0 else []
            ranks.append(math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0)
        return sum(ranks) / len(ranks)


def spectrum(state: AdapterState, path: str) -> Spectrum | None:
    """The singular values of the change at a target; None without a low-rank method, or with a NaN or infinity.

    For DoRA it is the change of the direction, before the magnitude.

    Args:
        state: The adapter.
        path: One of its targets.
    """
    method = state.spec.methods[path]
    method = getattr(method, "inner", method)
    if not isinstance(method, LowRankMethod):
        return None
    tensors = {name: tensor.double() for name, tensor in state.parameters(path).items()}
    A, B, scale = method.factors(state.spec.shapes[path], tensors)
    if not A.shape[-2]:  # a target that AdaLoRA has pruned away
        return Spectrum(A.new_zeros(*A.shape[:-2], 1))
    small = torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT
    if not torch.isfinite(small).all():
        return None
    return Spectrum(torch.linalg.svdvals(small) * abs(scale))
