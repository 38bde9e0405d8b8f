"""Several adapters as one: the weighted sum of their changes, or another way to make one of many."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.adapters import consensus, peft_ways
from lorakit.adapters.change import (
    Base,
    Change,
    as_lora,
    bias_change,
    dense_change,
    is_copy,
    is_low_rank,
    low_rank_change,
    widest_dtype,
)
from lorakit.adapters.fit import Cut, Fitted, Residual, split
from lorakit.adapters.together import Together
from lorakit.core import AdapterSpec, AdapterState, LowRankMethod, Method
from lorakit.errors import ConfigError, near_matches
from lorakit.ops.low_rank_svd import low_rank_svd
from lorakit.ops.truncated_svd import leading_triplets

Consensus = Callable[[Sequence[Tensor], float, torch.Generator], Tensor]

CONSENSUS: Mapping[str, Consensus] = {
    "ties": consensus.ties,
    "dare_ties": consensus.dare_ties,
    "dare_linear": consensus.dare_linear,
    "magnitude_prune": consensus.magnitude_prune,
}
"""Ways that go entry by entry over the dense changes."""

WAYS: Mapping[str, str] = {
    "sum": "the weighted sum; exact, or cut to r or energy",
    "cat": "the weighted sum by stacking; always exact, ranks add up",
    "svd": "the weighted sum cut to r or energy; r is the largest rank of the inputs by default",
    "ties": "trim each change, elect signs, average what agrees (TIES), on the true change",
    "dare_linear": "drop entries at random, rescale, add (DARE), on the true change",
    "dare_ties": "drop entries at random, rescale, elect signs, average, on the true change",
    "magnitude_prune": "trim each change, add, on the true change",
    "lorahub": "s (sum w B)(sum w A): quadratic in the weights, with cross terms, as LoraHub defines it",
    **peft_ways.WAYS,
}
"""The ways to combine, and what each does."""


@dataclass(frozen=True)
class _Plan:
    how: str
    weights: tuple[float, ...]
    cut: Cut
    density: float
    generator: torch.Generator
    dense: bool
    base: Base | None
    dtype: torch.dtype | None


def combine(
    states: Sequence[AdapterState],
    weights: Sequence[float] | None = None,
    how: str = "sum",
    *,
    r: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int = 0,
    dense: bool = False,
    base: Base | None = None,
    copies: str = "refuse",
    any_base: bool = False,
    dtype: torch.dtype | None = None,
) -> Fitted:
    """One adapter from several.

    Ranks, scales (rsLoRA too) and sets of targets may differ: an adapter without a target adds nothing there. The
    result is a plain LoRA. With ``how="sum"`` and no cut it is exact: the factors are stacked, their ranks add up.
    With a cut, the singular values of the stacked factors are found by two thin QR decompositions, and the result is
    the best that there is at that rank.

    Args:
        states: One or more adapters.
        weights: A number for each, of any sign; 1 by default.
        how: A key of `WAYS`.
        r: The most directions of a target in the result.
        energy: The share of the squared norm to keep at each target, in (0, 1].
        density: For the ways that trim or drop: the share of entries that is kept, in (0, 1].
        seed: Draws what DARE drops.
        dense: Form the change of methods without factors (LoHa, LoKr, LoRA-C), one target at a time. Needs ``r`` or
            ``energy``.
        base: Target path to base weight ``(*batch, out, in)``: with it DoRA, IA3 and trained copies are taken as
            the true change ``W' - W``.
        copies: What becomes of targets that are trained copies (heads, token rows, biases): ``"refuse"``;
            ``"average"``, the mean weighted by ``weights``; ``"drop"``.
        any_base: Combine adapters whose files name different base models.
        dtype: Of the result; by default the widest of the inputs at each target.

    Raises:
        ConfigError: The adapters do not fit together, a tensor is not finite, or a setting makes no sense.
    """
    plan = _plan(states, weights, how, Cut(r, energy), density, seed, dense, base, dtype)
    together = Together(states, any_base=any_base)
    if copies not in ("refuse", "average", "drop"):
        raise ConfigError(f"copies is 'refuse', 'average' or 'drop'; got {copies!r}.")
    if how in peft_ways.WAYS or how == "lorahub":
        peft_ways.check(together, plan.weights, how)
    rank = _default_rank(states) if how in _CUT_BY_DEFAULT and not plan.cut else None
    methods: dict[str, Method] = {}
    tensors: dict[str, Mapping[str, Tensor]] = {}
    residuals: dict[str, Residual] = {}
    for path in together.shapes:
        holders = together.holders(path)
        kinds = {is_copy(states[i].spec.methods[path]) for i in holders}
        if True in kinds and (base is None or path not in base) and copies != "refuse":
            if copies == "average":
                methods[path], tensors[path] = _average_of_copies(states, plan.weights, path, holders)
            continue
        if how in peft_ways.WAYS or how == "lorahub":
            A, B, residual = peft_ways.factors(
                how, states, plan.weights, path, holders, plan.cut.r or rank, density, plan.generator
            )
            kind = dtype or widest_dtype([states[i].tensors[path]["lora_A"] for i in holders])
            methods[path], tensors[path] = as_lora(A, B, None, scale=1.0, dtype=kind)
        else:
            methods[path], tensors[path], residual = _at(states, plan, path, holders, rank)
        if residual is not None:
            residuals[path] = residual
    if not methods:
        raise ConfigError("Nothing is left to combine: every target is a trained copy, and copies='drop'.")
    info = together.info(how, plan.weights)
    state = AdapterState(
        AdapterSpec(methods, {p: together.shapes[p] for p in methods}, together.base, info), tensors
    )
    _check_range(state)
    return Fitted(state, residuals)


def scaled(state: AdapterState, weight: float) -> AdapterState:
    """``weight`` times the change of an adapter, as a plain LoRA; for a positive one the factors stay bit for bit."""
    return combine([state], [weight]).state


def negated(state: AdapterState) -> AdapterState:
    """The adapter that takes away what this one adds, as a plain LoRA."""
    return scaled(state, -1.0)


_CUT_BY_DEFAULT = {"svd", *CONSENSUS, *(how for how in peft_ways.WAYS if how.endswith("svd"))}


def _plan(
    states: Sequence[AdapterState],
    weights: Sequence[float] | None,
    how: str,
    cut: Cut,
    density: float | None,
    seed: int,
    dense: bool,
    base: Base | None,
    dtype: torch.dtype | None,
) -> _Plan:
    if how not in WAYS:
        raise ConfigError(
            f"No way to combine is called {how!r}.{near_matches(how, WAYS)} Known: {', '.join(WAYS)}."
        )
    if not states:
        raise ConfigError("combine needs at least one adapter.")
    weights = [1.0] * len(states) if weights is None else weights
    if len(weights) != len(states) or not all(math.isfinite(w) for w in weights):
        raise ConfigError(
            f"combine needs a finite weight for each of {len(states)} adapters; got {list(weights)}."
        )
    needs_density = how in CONSENSUS or any(word in how for word in ("ties", "dare", "prune"))
    if needs_density != (density is not None):
        raise ConfigError(
            f"{how} needs density, the share of entries that is kept."
            if needs_density
            else f"{how} takes no density."
        )
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density is the share of entries that is kept, in (0, 1]; got {density!r}.")
    exact = how == "cat" or how == "lorahub" or (how.startswith("peft_") and not how.endswith("svd"))
    if cut and exact:
        raise ConfigError(
            f"The ranks of {how!r} follow from the inputs: leave r and energy out, or resize the result."
        )
    if cut.energy is not None and how.startswith("peft_"):
        raise ConfigError(f"PEFT's {how!r} knows no energy, only r.")
    generator = torch.Generator().manual_seed(seed)
    return _Plan(how, tuple(map(float, weights)), cut, density or 1.0, generator, dense, base, dtype)


def _at(
    states: Sequence[AdapterState], plan: _Plan, path: str, holders: Sequence[int], rank: int | None
) -> tuple[Method, Mapping[str, Tensor], Residual | None]:
    """The combination at one target."""
    dtype = plan.dtype or widest_dtype([t for i in holders for t in states[i].parameters(path).values()])
    bias = _bias(states, plan, path, holders)
    low_rank = all(is_low_rank(states[i], path) for i in holders)
    if plan.how in CONSENSUS:
        changes = [plan.weights[i] * _dense(states[i], plan, path) for i in holders]
        change = CONSENSUS[plan.how](changes, plan.density, plan.generator)
    elif low_rank or not (plan.dense or plan.base):
        stacked, scale = _stacked(
            [low_rank_change(states[i], path) for i in holders], [plan.weights[i] for i in holders]
        )
        cut = plan.cut or Cut(r=rank)
        if not cut:
            return *as_lora(*stacked, bias, scale=scale, dtype=dtype), None
        triplets = low_rank_svd(stacked[0], stacked[1])
        A, B, residual = split(triplets, cut.rank(triplets.S))
        residual = Residual(residual.r, residual.norm * scale, residual.lost * scale)
        return *as_lora(A, B, bias, scale=scale, dtype=dtype), residual
    else:
        change = consensus.total([plan.weights[i] * _dense(states[i], plan, path) for i in holders])
    cut = plan.cut or Cut(r=rank)
    if not cut:
        raise ConfigError(f"The change at {path!r} is dense: say how many directions to keep, r or energy.")
    triplets = leading_triplets(change, min(change.shape[-2:]))
    A, B, residual = split(triplets, cut.rank(triplets.S))
    return *as_lora(A, B, bias, scale=1.0, dtype=dtype), residual


def _stacked(changes: Sequence[Change], weights: Sequence[float]) -> tuple[tuple[Tensor, Tensor], float]:
    """``A`` and ``B`` side by side, and a scale: of equal weights nothing but the sign is multiplied into ``B``."""
    scales = [weight * change.scale for weight, change in zip(weights, changes, strict=True)]
    common = max(map(abs, scales)) or 1.0
    A = torch.cat([change.A for change in changes], dim=-2)
    B = torch.cat([change.B * (s / common) for s, change in zip(scales, changes, strict=True)], dim=-1)
    if not A.shape[-2]:  # every direction had been pruned away
        A, B = A.new_zeros(*A.shape[:-2], 1, A.shape[-1]), B.new_zeros(*B.shape[:-1], 1)
    return (A, B), common


def _dense(state: AdapterState, plan: _Plan, path: str) -> Tensor:
    if is_low_rank(state, path) or plan.dense or plan.base is not None:
        return dense_change(state, path, plan.base)
    change = low_rank_change(state, path)  # says why there are no factors
    return change.scale * (change.B @ change.A)


def _bias(states: Sequence[AdapterState], plan: _Plan, path: str, holders: Sequence[int]) -> Tensor | None:
    found = [(plan.weights[i], bias) for i in holders if (bias := bias_change(states[i], path)) is not None]
    if not found:
        return None
    biases = [weight * bias for weight, bias in found]
    return (
        CONSENSUS[plan.how](biases, plan.density, plan.generator)
        if plan.how in CONSENSUS
        else consensus.total(biases)
    )


def _average_of_copies(
    states: Sequence[AdapterState], weights: Sequence[float], path: str, holders: Sequence[int]
) -> tuple[Method, Mapping[str, Tensor]]:
    first = states[holders[0]].spec.methods[path]
    whole = math.fsum(weights[i] for i in holders)
    if any(states[i].spec.methods[path] != first for i in holders):
        raise ConfigError(
            f"The copies at {path!r} are of different kinds: {first} and others. Use copies='drop'."
        )
    if not whole:
        raise ConfigError(
            f"The weights of the copies at {path!r} add up to zero: they have no mean. Use copies='drop'."
        )
    named = {}
    for name, tensor in states[holders[0]].tensors[path].items():
        mean = consensus.total(
            [states[i].tensors[path][name].double() * (weights[i] / whole) for i in holders]
        )
        named[name] = mean.to(tensor.dtype)
    return first, named


def _default_rank(states: Sequence[AdapterState]) -> int | None:
    """The largest rank of any target; None where no method has one."""
    ranks = [
        method.factors(state.spec.shapes[path], state.parameters(path)).A.shape[-2]
        for state in states
        for path, method in state.spec.methods.items()
        if isinstance(method, LowRankMethod)
    ]
    return max(1, *ranks) if ranks else None


def _check_range(state: AdapterState) -> None:
    bad = state.non_finite()
    if bad:
        raise ConfigError(
            f"The combination does not fit the dtype of {bad[0]}: an entry is too large. Pass dtype=torch.float32."
        )
