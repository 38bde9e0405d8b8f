"""Weighted mixes of adapters: checked, named, and made by stacking, which is exact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lorakit.adapters.combine import combine
from lorakit.core.adapter import AdapterState
from lorakit.errors import AdapterIncompatibleError, ConfigError, InvalidRequestError
from lorakit.serve.sources import Limits
from lorakit.serve.versions import Lease, largest_rank, parse_id

MOST_PARTS = 16


def check_parts(weights: Mapping[str, float]) -> dict[str, float]:
    """The parts of a mix that have a weight.

    Raises:
        InvalidRequestError: There are none or too many, or a weight is no finite number.
        InvalidAdapterIdError: A part has no possible name.
    """
    parts = {}
    for name, weight in weights.items():
        parse_id(name)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise InvalidRequestError(
                f"The weight of {name!r} in a mix must be a finite number; got {weight!r}.", param="model"
            )
        if weight:
            parts[name] = float(weight)
    if not 1 <= len(parts) <= MOST_PARTS:
        raise InvalidRequestError(
            f"A mix has 1 to {MOST_PARTS} adapters with weights other than zero; got {len(parts)}.",
            param="model",
        )
    return parts


def mix_name(parts: Mapping[str, float]) -> str:
    """``"a:0.5+b:0.5"``."""
    return "+".join(f"{name}:{weight:g}" for name, weight in parts.items())


def by_digest(leases: Sequence[Lease], weights: Sequence[float]) -> dict[str, float]:
    """Digest to weight; the weights of one content under several names add up, and what comes to zero is left out."""
    total: dict[str, float] = {}
    for lease, weight in zip(leases, weights, strict=True):
        total[lease.version.digest] = total.get(lease.version.digest, 0.0) + weight
    left = {digest: weight for digest, weight in total.items() if weight}
    if not left:
        raise InvalidRequestError("The weights of the mix cancel out: nothing is left of it.", param="model")
    return left


def make_mix(states: Sequence[AdapterState], weights: Sequence[float], limits: Limits) -> AdapterState:
    """The weighted sum as one adapter; the ranks add up.

    Raises:
        AdapterIncompatibleError: One of them has no factors (DoRA, IA3, a trained head), or the rank is over the limit.
    """
    try:
        state = combine(states, weights, "cat", any_base=True).state
    except ConfigError as error:
        raise AdapterIncompatibleError(f"These adapters cannot be mixed: {error}", param="model") from None
    rank = largest_rank(state) or 0
    if limits.rank is not None and rank > limits.rank:
        raise AdapterIncompatibleError(
            f"The mix has rank {rank}, the sum of its parts' ranks; at most {limits.rank} is served here.",
            param="model",
        )
    return state
