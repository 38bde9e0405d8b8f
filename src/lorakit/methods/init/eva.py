"""EVA: ``A`` starts as the directions in which a layer's inputs vary most, ``B`` at zero; ranks go where variance is.

The directions are found batch by batch. What is kept of the batches so far is their mean and their leading singular
triplets; a new batch is stacked below these and decomposed again (incremental principal components; Ross et al. 2008,
equations 5 to 9).
Source: Paischer et al. 2024 (arXiv 2410.07170), algorithm 1. Its text speaks of a plain singular value
decomposition, its code centres the inputs: ``centred`` says which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.ops.truncated_svd import leading_triplets_by_projection

_SPARE = 8


@dataclass(frozen=True)
class Components:
    """The principal components of the rows seen so far; a value, never changed.

    Attributes:
        wanted: How many are of interest; over twice as many are kept, for what is cut off cannot come back.
        centred: Whether the mean of the rows is taken out.
        count: Rows seen.
        mean: Of the rows, ``(d,)``.
        scatter: The sum of their squared distances from the mean (from zero if not centred), over all columns.
        values: Singular values, ``(kept,)``, descending.
        directions: Right singular vectors as orthonormal rows, ``(kept, d)``.
        moved: The cosine of each wanted direction with the same one before the last rows; empty after the first.
    """

    wanted: int
    centred: bool = True
    count: int = 0
    mean: Tensor | None = None
    scatter: float = 0.0
    values: Tensor | None = None
    directions: Tensor | None = None
    moved: Tensor | None = None

    def updated(self, rows: Tensor, generator: torch.Generator | None = None) -> Components:
        """The components with these rows ``(m, d)`` taken into account, in at least float32."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        m, n = len(rows), self.count
        if not m:
            return self
        blocks = []
        if self.values is not None and self.directions is not None:
            blocks.append(self.values.unsqueeze(-1) * self.directions)
        mean, scatter = rows.new_zeros(rows.shape[-1]), self.scatter
        if self.centred:
            mean = rows.mean(0)
            rows = rows - mean
            if self.mean is not None:
                step = math.sqrt(n * m / (n + m)) * (self.mean - mean)
                blocks.append(step.unsqueeze(0))
                scatter += float(step.square().sum())
                mean = self.mean + (mean - self.mean) * (m / (n + m))
        scatter += float(rows.square().sum())
        stack = torch.cat([*blocks, rows])
        kept = min(2 * self.wanted + _SPARE, *stack.shape)
        _, values, directions = leading_triplets_by_projection(stack, kept, generator=generator)
        moved = None
        if self.directions is not None:
            both = min(self.wanted, len(self.directions), len(directions))
            moved = (directions[:both] * self.directions[:both]).sum(-1).abs()
        return Components(self.wanted, self.centred, n + m, mean, scatter, values, directions, moved)

    @property
    def ratios(self) -> Tensor:
        """The share of the variance that each wanted direction explains, descending; float64 on the CPU."""
        assert self.values is not None
        return self.values[: self.wanted].double().cpu().square() / max(
            self.scatter, torch.finfo(torch.float32).tiny
        )

    def settled(self, r: int, tau: float) -> bool:
        """Whether each of the first ``r`` directions kept a cosine of at least ``tau`` when the last rows came."""
        return self.moved is not None and len(self.moved) >= r and bool((self.moved[:r] >= tau).all())


def share_out(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of each layer's components are among the ``budget`` largest of all layers together.

    Args:
        ratios: Layer to the shares of variance of its components, descending: at most as many as its rank may be.
        budget: The sum of all ranks.

    Returns:
        Layer to rank; 0 for a layer whose components are all too small. Of equal components those of earlier layers
        win.
    """
    names = [name for name, shares in ratios.items() for _ in shares]
    order = torch.cat(list(ratios.values())).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(ratios, 0)
    for place in order[:budget].tolist():
        ranks[names[place]] += 1
    return ranks


def eva(components: Components, out: int, r: int) -> tuple[Tensor, Tensor]:
    """``A`` ``(r, in)``: the first r directions, with ``A Aᵀ = I``; ``B = 0`` ``(out, r)``."""
    assert components.directions is not None
    A = components.directions[:r].contiguous()
    return A, A.new_zeros(out, r)
