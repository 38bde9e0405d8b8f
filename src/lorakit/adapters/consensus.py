"""How several changes of one weight become one entry by entry: trimming, election of signs, random dropping.

All take the changes ``w_i delta_i`` of one target as a list of tensors of equal size. Sources: TIES, Yadav et al. 2023
(arXiv 2306.01708), sections 3 and 4; DARE, Yu et al. 2023 (arXiv 2311.03099), section 3. Both trim and drop within each
target, where the authors of TIES take the whole model as one vector: so one target is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def total(changes: Sequence[Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack(tuple(changes)).sum(0)


def trimmed(change: Tensor, density: float) -> Tensor:
    """The share ``density`` of the entries that are largest in magnitude; the others are zero."""
    keep = max(1, round(density * change.numel()))
    if keep >= change.numel():
        return change
    flat = change.reshape(-1)
    chosen = flat.abs().topk(keep, sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, chosen, flat[chosen]).view_as(change)


def dropped(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with probability ``density`` and divided by it: the expectation is the change."""
    if density >= 1:
        return change
    kept = torch.empty_like(change, device="cpu").bernoulli_(density, generator=generator)
    return change * kept.to(change.device) / density


def elected_mean(changes: Sequence[Tensor]) -> Tensor:
    """The mean of those entries that have the sign of the sum; entries that are zero have no vote.

    Where the votes cancel, the sign that more entries of the whole have decides.
    """
    stacked = torch.stack(tuple(changes))
    sign = stacked.sum(0).sign()
    majority = 1.0 if float(sign.sum()) >= 0 else -1.0
    sign = torch.where(sign == 0, majority, sign)
    agreeing = (stacked.sign() == sign) & (stacked != 0)
    return torch.where(agreeing, stacked, 0.0).sum(0) / agreeing.sum(0).clamp_min(1)


def ties(changes: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """Trim, elect the signs, average those that agree."""
    return elected_mean([trimmed(change, density) for change in changes])


def dare_ties(changes: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """Drop at random and rescale, elect the signs, average those that agree."""
    return elected_mean([dropped(change, density, generator) for change in changes])


def dare_linear(changes: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """Drop at random and rescale, add up."""
    return total([dropped(change, density, generator) for change in changes])


def magnitude_prune(changes: Sequence[Tensor], density: float, generator: torch.Generator) -> Tensor:
    """Trim, add up."""
    return total([trimmed(change, density) for change in changes])
