"""A search for weights that needs no gradient: what LoraHub does with a handful of examples.

Source: Huang et al. 2023 (arXiv 2307.13269), section 3.3: the loss on a few examples plus 0.05 times the mean of the
absolute weights, weights within 1.5 of zero, started at zero, 40 tries. The authors let nevergrad choose an optimizer;
this is a (1+1) evolution strategy with the one-fifth success rule (Rechenberg 1973), which needs no package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorakit.errors import ConfigError

_GROWTH = 1.5  # of the step after a success; shrunk by its fourth root after a failure: one in five keeps it


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        weights: The best weights.
        loss: Their loss, with the penalty.
        tried: All weights that were tried and their losses, in order.
    """

    weights: tuple[float, ...]
    loss: float
    tried: tuple[tuple[tuple[float, ...], float], ...]


def search_weights(
    loss: Callable[[tuple[float, ...]], float],
    count: int,
    *,
    tries: int = 40,
    bound: float = 1.5,
    penalty: float = 0.05,
    start: Sequence[float] | None = None,
    step: float = 0.5,
    seed: int = 0,
) -> Searched:
    """Weights of small loss.

    Args:
        loss: From weights to a number; NaN or infinity counts as worse than anything.
        count: How many weights.
        tries: How often the loss is computed.
        bound: The largest absolute weight.
        penalty: Times the mean of the absolute weights, added to the loss.
        start: The first weights; zeros by default.
        step: The first standard deviation of a change.
        seed: Draws the changes.

    Raises:
        ConfigError: A setting makes no sense.
    """
    first = tuple(map(float, start)) if start is not None else (0.0,) * count
    if count < 1 or tries < 1 or len(first) != count or not (bound > 0 and step > 0 and penalty >= 0):
        raise ConfigError(
            "search_weights needs count and tries of at least 1, one start for each weight, bound and step above 0 and "
            f"penalty of at least 0; got {count=}, {tries=}, {start=}, {bound=}, {step=}, {penalty=}."
        )
    generator = torch.Generator().manual_seed(seed)
    tried = []

    def judge(weights: tuple[float, ...]) -> float:
        found = float(loss(weights)) + penalty * math.fsum(map(abs, weights)) / count
        found = found if math.isfinite(found) else math.inf
        tried.append((weights, found))
        return found

    best = tuple(max(-bound, min(bound, w)) for w in first)
    least = judge(best)
    for _ in range(tries - 1):
        change = torch.randn(count, generator=generator, dtype=torch.float64) * step
        weights = tuple(max(-bound, min(bound, w + d)) for w, d in zip(best, change.tolist(), strict=True))
        found = judge(weights)
        if found < least:
            best, least, step = weights, found, step * _GROWTH
        else:
            step /= _GROWTH**0.25
    return Searched(best, least, tuple(tried))
