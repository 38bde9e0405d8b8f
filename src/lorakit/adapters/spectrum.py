"""The singular values of a change, of a low-rank one from its factors alone.

With ``B = Q_B R_B`` and ``Aᵀ = Q_A R_A`` the singular values of ``s B A`` are those of the r x r matrix ``s R_B R_Aᵀ``:
the out x in product is never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lorakit.adapters.change import Base, dense_change, has_factors, low_rank_change, without_magnitude
from lorakit.adapters.fit import Cut, energy_rank
from lorakit.core import AdapterState, DeltaMethod, WeightMethod
from lorakit.ops.low_rank_svd import low_rank_core


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

    @cached_property
    def frobenius(self) -> float:
        """The Frobenius norm of the change, of the whole stack."""
        return float(self.values.square().sum().sqrt())

    @cached_property
    def energy(self) -> Tensor:
        """``(r,)``: the share of the squared norm that the first k directions hold, for k = 1 to r; 0 without a change.

        Of a stack the sums over all matrices count.
        """
        squares = self._rows.square().sum(0)
        return squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)

    def energy_rank(self, share: float) -> int:
        """The least number of directions that hold this share of the squared norm; 1 without a change.

        Raises:
            ConfigError: The share is not in (0, 1].
        """
        Cut(energy=share)
        return energy_rank(self.values, share)

    @cached_property
    def effective_rank(self) -> float:
        """``exp`` of the entropy of the normalised singular values: 1 for one direction, r for r equal ones.

        The mean over a stack; 0 where there is no change. Source: Roy and Vetterli 2007.
        """
        ranks = []
        for row in self._rows:
            total = float(row.sum())
            shares = [float(v) / total for v in row if v > 0] if total > 0 else []
            ranks.append(math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0)
        return sum(ranks) / len(ranks)

    @cached_property
    def stable_rank(self) -> float:
        """The squared Frobenius norm by the squared spectral norm: never more than the effective rank.

        The mean over a stack; 0 where there is no change.
        """
        tops = self._rows.amax(-1)
        found = [float((row / top).square().sum()) for row, top in zip(self._rows, tops, strict=True) if top]
        return sum(found) / len(tops)

    @property
    def _rows(self) -> Tensor:
        return self.values.reshape(-1, self.values.shape[-1])


def spectrum(
    state: AdapterState, path: str, *, dense: bool = False, base: Base | None = None
) -> Spectrum | None:
    """The singular values of the change at a target; None where they cannot be had, or are not finite.

    Without ``base`` those of DoRA are of the change of the direction, before the magnitude.

    Args:
        state: The adapter.
        path: One of its targets.
        dense: Form the change of a method without factors (LoHa, LoKr, LoRA-C) and decompose it: slow where it is wide.
        base: Target path to base weight: then also the changes that depend on it (DoRA, IA3, trained copies) are formed
            and decomposed, DoRA's with its magnitude.
    """
    method = state.spec.methods[path]
    formed = base is not None and path in base and not isinstance(method, DeltaMethod)
    if has_factors(state, path) and not formed:
        A, B, scale = low_rank_change(without_magnitude(state, path), path)
        if not A.shape[-2]:  # a target that AdaLoRA has pruned away
            return Spectrum(A.new_zeros(*A.shape[:-2], 1))
        small = scale * low_rank_core(A, B)
    elif (dense and isinstance(method, DeltaMethod)) or (formed and isinstance(method, WeightMethod)):
        small = dense_change(state, path, base)
    else:
        return None
    return Spectrum(torch.linalg.svdvals(small)) if torch.isfinite(small).all() else None
