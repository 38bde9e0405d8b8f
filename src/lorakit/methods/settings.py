"""Settings that several methods have: what they may be, said once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lorakit.core.target import Target
from lorakit.errors import ConfigError, near_matches


def check_rank(r: Any, name: str = "r") -> None:
    """Raise `ConfigError` unless ``r`` is a whole number of at least 1."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ConfigError(f"The rank must be a whole number of at least 1; got {name}={r!r}.")


_LARGEST = 3.4e38
"""About the largest number of float32, in which scales are multiplied."""


def check_alpha(alpha: Any) -> None:
    """Raise `ConfigError` unless ``alpha`` is a finite number, which float32 can hold."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= _LARGEST:
        raise ConfigError(f"alpha must be a finite number; got {alpha!r}.")


def check_dropout(dropout: Any) -> None:
    """Raise `ConfigError` unless ``dropout`` is a probability below 1."""
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ConfigError(f"dropout is a probability in [0, 1); got {dropout!r}.")


def check_choice(what: str, value: Any, known: Collection[str]) -> None:
    """Raise `ConfigError` unless ``value`` is one of the words ``known``."""
    if value not in known:
        raise ConfigError(
            f"No {what} is called {value!r}.{near_matches(str(value), known)} Known: {sorted(known)}."
        )


def check_rank_fits(r: int, target: Target, name: str = "r", *, by_pattern: bool = False) -> None:
    """Raise `ConfigError` if no change of a matrix of this size can have that rank.

    Args:
        r: The rank.
        target: What it is for.
        name: The setting that gives it.
        by_pattern: Whether the method has a ``rank_pattern``, which could give this target a rank of its own.
    """
    most = min(target.out, target.in_)
    if r > most:
        own = (
            f"give this target its own rank (rank_pattern={{{target.path!r}: {most}}}), "
            if by_pattern
            else ""
        )
        raise ConfigError(
            f"{name}={r} is more than a {target.shape} matrix can have at {target.path!r}: its rank is at most {most}. "
            f"Choose {name} <= {most}, {own}or exclude it."
        )


def no_input_to_drop(target: Target, dropout: float) -> str | None:
    """Why dropout is not possible at a target, or None."""
    if dropout and target.binding == "parameter":
        return "its layer reads the weight directly, so there is no input to drop: use dropout=0"
    return None
