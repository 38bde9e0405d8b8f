"""What an adapter amplifies of its base: the amplification factor of the LoRA paper, section 7.3 and table 7.

``||dW||_F / ||Uᵀ W V||_F``, with the left and right singular vectors ``U``, ``V`` of the change ``dW``: how much larger
the change is than what the base weight already does between the same directions. Large: the adapter strengthens what
is in the base but weak there. (The paper writes the projection for weights whose rows are inputs; here ``W`` is ``(out,
in)`` as torch keeps it.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.adapters.change import (
    base_weight,
    dense_change,
    has_factors,
    is_low_rank,
    low_rank_change,
    without_magnitude,
)
from lorakit.adapters.subspaces import change_triplets, real_directions
from lorakit.core import AdapterState
from lorakit.errors import ConfigError
from lorakit.ops import all_finite
from lorakit.ops.truncated_svd import Triplets, leading_triplets, leading_triplets_by_projection

_EXACT = 1024  # up to this size the base weight is decomposed exactly


@dataclass(frozen=True)
class Amplification:
    """A change beside the base weight that it is added to; all are Frobenius norms, of a whole stack.

    Attributes:
        r: How many directions of the change are looked at.
        change: Norm of the change in these directions.
        whole: Norm of the whole change.
        weight: Norm of the base weight.
        within: Norm of ``Uᵀ W V``: what the base does between the directions of the change.
        random: What it does between as many random directions, as root mean square: ``||W|| r / sqrt(out in)``.
        top: What it does between its own first directions, the most there is; None where that was not asked for.
    """

    r: int
    change: float
    whole: float
    weight: float
    within: float
    random: float
    top: float | None = None

    @property
    def factor(self) -> float:
        """The amplification factor ``change / within``; infinite where the base does nothing between the directions."""
        if not self.within:
            return math.inf if self.change else 0.0
        return self.change / self.within

    @property
    def relative(self) -> float:
        """The norm of the whole change by that of the base weight."""
        return self.whole / self.weight if self.weight else math.inf


def amplification(
    state: AdapterState, path: str, W: Tensor, *, r: int | None = None, top: bool = False
) -> Amplification:
    """The amplification factor at a target, and what it is made of.

    A DoRA counts with its magnitude: its true change has full rank, so ``r`` is by default that of what is inside.

    Args:
        state: The adapter.
        path: The target.
        W: The base weight as the stack ``(*batch, out, in)`` that the method sees (a transformers' ``Conv1D`` keeps the
            transpose), in any floating dtype; computed in float64.
        r: Look at the first ``r`` directions of the change alone; by default at all that a low-rank method has.
        top: Also tell what the base does between its own first directions: it is decomposed for that, exactly up to
            1024 rows or columns, by subspace iteration beyond.

    Raises:
        ConfigError: ``W`` has another size, a number is not finite, the method has no rank and ``r`` is not given, or
            it changes no weight.
    """
    shape = state.spec.shapes[path]
    W = base_weight(path, shape, W)
    if not all_finite(W):
        raise ConfigError(f"The base weight of {path!r} holds a NaN or an infinity.")
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise ConfigError(f"The number of directions must be a whole number of at least 1; got r={r!r}.")
    (U, S, Vh), whole = _triplets(state, path, W, r)
    kept = S.shape[-1] if r is None else min(r, S.shape[-1])
    U, S, Vh = U[..., :kept], S[..., :kept], Vh[..., :kept, :]
    weight = float(W.norm())
    return Amplification(
        kept,
        float(S.norm()),
        whole,
        weight,
        float((U.mT @ W @ Vh.mT).norm()),
        weight * kept / math.sqrt(shape.out * shape.in_),
        _top(W, kept) if top else None,
    )


def _triplets(state: AdapterState, path: str, W: Tensor, r: int | None) -> tuple[Triplets, float]:
    """The directions of the change, or the first of them, and the norm of all of it."""
    if is_low_rank(state, path):
        U, S, Vh = change_triplets(state, path)
        real = real_directions(S, max(W.shape[-2:]))
        return Triplets(U[..., :real], S[..., :real], Vh[..., :real, :]), float(S.norm())
    rank = r if r is not None else _rank(state, path)
    if rank is None:
        raise ConfigError(
            f"{path!r} is adapted by {state.spec.methods[path].name}, whose change has no rank of its own: say how "
            "many of its directions to look at, r=8 for instance."
        )
    change = dense_change(state, path, {path: W})
    if not torch.isfinite(change).all():
        raise ConfigError(
            f"The change at {path!r} holds a NaN or an infinity: its training went wrong there."
        )
    return _leading(change, min(rank, *change.shape[-2:])), float(change.norm())


def _rank(state: AdapterState, path: str) -> int | None:
    """The rank of a low-rank method, also inside a DoRA; None of one without."""
    if not has_factors(state, path):
        return None
    return low_rank_change(without_magnitude(state, path), path).A.shape[-2]


def _top(W: Tensor, r: int) -> float:
    return float(_leading(W, r).S.norm())


def _leading(W: Tensor, r: int) -> Triplets:
    if min(W.shape[-2:]) <= _EXACT:
        return leading_triplets(W, r)
    return leading_triplets_by_projection(W, r, generator=torch.Generator().manual_seed(0))
