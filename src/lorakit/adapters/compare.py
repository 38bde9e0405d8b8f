"""How alike two adapters are, and one without what it has in common with another; the changes are never formed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorakit.adapters.change import (
    Base,
    Change,
    as_lora,
    bias_change,
    dense_change,
    is_low_rank,
    low_rank_change,
    widest_dtype,
)
from lorakit.adapters.subspaces import is_real
from lorakit.adapters.together import Together
from lorakit.core import AdapterSpec, AdapterState
from lorakit.core.method import Method
from lorakit.errors import ConfigError
from lorakit.ops.low_rank_svd import low_rank_inner, low_rank_norm


@dataclass(frozen=True)
class Likeness:
    """Two changes beside each other, in the Frobenius inner product.

    Attributes:
        norm_a: Norm of the first.
        norm_b: Norm of the second.
        inner: The sum of the products of their entries.
        distance: Norm of the difference.
    """

    norm_a: float
    norm_b: float
    inner: float
    distance: float

    @property
    def cosine(self) -> float | None:
        """``inner / (norm_a norm_b)``; None where one of them is zero."""
        return cosine(self.inner, self.norm_a, self.norm_b)


@dataclass(frozen=True)
class Comparison:
    """Two adapters beside each other.

    Attributes:
        targets: Target path to what is said of it; where only one adapter has it the other counts as zero.
        only_a: Targets that only the first has.
        only_b: Targets that only the second has.
    """

    targets: Mapping[str, Likeness]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def whole(self) -> Likeness:
        """All targets as one vector."""
        all_ = self.targets.values()
        return Likeness(
            math.hypot(*(one.norm_a for one in all_), 0.0),
            math.hypot(*(one.norm_b for one in all_), 0.0),
            math.fsum(one.inner for one in all_),
            math.hypot(*(one.distance for one in all_), 0.0),
        )


def compare(
    a: AdapterState, b: AdapterState, *, dense: bool = False, base: Base | None = None, any_base: bool = False
) -> Comparison:
    """Norms, cosine and distance of two adapters, for each target and as a whole.

    Args:
        a: The first.
        b: The second.
        dense: Form the change of methods without factors (LoHa, LoKr, LoRA-C), one target at a time.
        base: Target path to base weight, for methods whose change depends on it (DoRA, IA3, trained copies).
        any_base: Compare adapters whose files name different base models.

    Raises:
        ConfigError: They do not belong to one base, a tensor is not finite, or a method has no factors.
    """
    together = Together([a, b], any_base=any_base)
    targets = {}
    for path in together.shapes:
        pair = [state for state in (a, b) if path in state.spec.methods]
        low = all(is_low_rank(state, path) for state in pair)
        if low or not (dense or base):
            found = [low_rank_change(s, path).folded() if path in s.spec.methods else None for s in (a, b)]
            targets[path] = _likeness(*[None if one is None else Change(*one) for one in found])
        else:
            dx, dy = (
                dense_change(s, path, base) if path in s.spec.methods else torch.zeros(()) for s in (a, b)
            )
            inner = float((dx * dy).sum())
            targets[path] = Likeness(float(dx.norm()), float(dy.norm()), inner, float((dx - dy).norm()))
    only = [
        tuple(p for p in one.spec.methods if p not in other.spec.methods) for one, other in ((a, b), (b, a))
    ]
    return Comparison(targets, *only)


def cosine(inner: float, norm_a: float, norm_b: float) -> float | None:
    """``inner / (norm_a norm_b)``, kept within -1 and 1 against rounding; None where one of the norms is zero."""
    norms = norm_a * norm_b
    return max(-1.0, min(1.0, inner / norms)) if norms else None


def _likeness(a: Change | None, b: Change | None) -> Likeness:
    norm_a, norm_b = (0.0 if c is None else float(low_rank_norm(c.A, c.B)) for c in (a, b))
    if a is None or b is None:
        return Likeness(norm_a, norm_b, 0.0, norm_a + norm_b)
    A, B = torch.cat([a.A, b.A], -2), torch.cat([a.B, -b.B], -1)
    return Likeness(norm_a, norm_b, float(low_rank_inner(a.A, a.B, b.A, b.B)), float(low_rank_norm(A, B)))


def orthogonalised(
    state: AdapterState, against: AdapterState, how: str = "direction", *, any_base: bool = False
) -> AdapterState:
    """The adapter without what it has in common with another, target by target, as a plain LoRA.

    Args:
        state: The adapter.
        against: The other one; targets that it does not have stay as they are.
        how: ``"direction"``: the change minus its projection on the other change (Gram-Schmidt with the Frobenius
            inner product; ranks add up). ``"inputs"``: it no longer reads what the other reads, ``delta (I - V Vᵀ)``
            with ``V`` the other's row space. ``"outputs"``: it no longer writes where the other writes,
            ``(I - U Uᵀ) delta``.
        any_base: Allow adapters whose files name different base models.

    Raises:
        ConfigError: They do not belong to one base, or a method has no factors.
    """
    if how not in ("direction", "inputs", "outputs"):
        raise ConfigError(f"how is 'direction', 'inputs' or 'outputs'; got {how!r}.")
    together = Together([state, against], any_base=any_base)
    methods: dict[str, Method] = {}
    tensors = {}
    for path in state.spec.methods:
        A, B = low_rank_change(state, path).folded()
        if path in against.spec.methods:
            A, B = _without(A, B, Change(*low_rank_change(against, path).folded()), how)
        dtype = widest_dtype(list(state.parameters(path).values()))
        if not A.shape[-2]:
            A, B = A.new_zeros(*A.shape[:-2], 1, A.shape[-1]), B.new_zeros(*B.shape[:-1], 1)
        methods[path], tensors[path] = as_lora(A, B, bias_change(state, path), scale=1.0, dtype=dtype)
    spec = AdapterSpec(methods, state.spec.shapes, together.base, state.spec.info)
    return AdapterState(spec, tensors)


def _without(A: torch.Tensor, B: torch.Tensor, other: Change, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    if how == "direction":
        square = float(low_rank_norm(other.A, other.B)) ** 2
        if not square:
            return A, B
        share = float(low_rank_inner(A, B, other.A, other.B)) / square
        return torch.cat([A, other.A], -2), torch.cat([B, -share * other.B], -1)
    if how == "inputs":
        V = _row_space(other.B, other.A)
        return A - (A @ V.mT) @ V, B
    U = _row_space(other.A.mT, other.B.mT)
    return A, B - U.mT @ (U @ B)


def _row_space(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows that span the row space of ``left right``; rows of zeros where it has fewer directions."""
    R = torch.linalg.qr(left, mode="r").R
    _, S, Vh = torch.linalg.svd(R @ right, full_matrices=False)
    return Vh * is_real(S, max(right.shape[-2:])).unsqueeze(-1)
