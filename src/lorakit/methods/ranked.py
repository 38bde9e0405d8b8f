"""A rank and a scale ``alpha / r``, each with other values for some targets: what several methods have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from lorakit.core.mapping import FixedMapping
from lorakit.core.method import DeltaMethod, Method
from lorakit.core.selection import pattern_matches
from lorakit.methods.settings import check_alpha, check_rank

M = TypeVar("M", bound="Ranked")


class Ranked(Method):
    """A method with the settings ``r`` and ``alpha``, and patterns that give some targets other values of them."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank_pattern", FixedMapping(self.rank_pattern))
        object.__setattr__(self, "alpha_pattern", FixedMapping(self.alpha_pattern))
        for r in (self.r, *self.rank_pattern.values()):
            check_rank(r)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            check_alpha(alpha)

    def for_path(self: M, path: str) -> M:
        """This method with the rank and alpha that the patterns give one target."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        r = next((r for key, r in self.rank_pattern.items() if pattern_matches(key, path)), self.r)
        alpha = next((a for key, a in self.alpha_pattern.items() if pattern_matches(key, path)), self.alpha)
        return dataclasses.replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})  # type: ignore[type-var]

    def patterns(self) -> tuple[str, ...]:
        """The keys of both patterns."""
        return (*self.rank_pattern, *self.alpha_pattern)


@dataclass(frozen=True)
class RankedMethod(Ranked, DeltaMethod):
    """A change with a rank, scaled by ``alpha / r``.

    Attributes:
        r: The rank.
        alpha: The numerator of the scale; with Adam it acts like a factor on the learning rate.
        rank_pattern: Another rank for the targets whose path matches a key, as in PEFT: a key is a regular
            expression for the end of the path or, after ``^``, for all of it; the first that matches wins.
        alpha_pattern: The same for ``alpha``.

    Raises:
        ConfigError: A value makes no sense.
    """

    r: int = 8
    alpha: float = 8.0
    rank_pattern: Mapping[str, int] = field(default_factory=FixedMapping)
    alpha_pattern: Mapping[str, float] = field(default_factory=FixedMapping)

    @property
    def scale(self) -> float:
        """``alpha / r``."""
        return self.alpha / self.r
