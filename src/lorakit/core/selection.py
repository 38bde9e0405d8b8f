"""Choosing targets by pattern, and saying what was meant when a pattern matches nothing.

The rules are those users of PEFT know: an entry of a list is a path or the end of one (``"q_proj"``,
``"layers.0.mlp.up_proj"``); a string is a preset or a regular expression for the whole path; a callable
decides by path and module. One entry that matches nothing is an error, however many others match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from torch import nn

from lorakit.core.expressions import expression
from lorakit.errors import UnmatchedTargetError, listing, near_matches

Selector = str | Sequence[str] | Callable[[str, nn.Module], bool]
Adapts = Literal["layer", "parameter", "module", "attention", "model"]
"""What a name means to a method: a layer, every parameter of what is named, a block, an attention, a whole model."""
PRESETS = (
    "all-linear", "all-conv", "all-parameters", "all-bias", "all-attention", "all-inputs",
    "all-keys-values-feedforward", "all-block-outputs", "all-ffn-outputs", "all-ffn",
)  # fmt: skip


def pattern_matches(key: str, path: str) -> bool:
    """PEFT's rule for ``rank_pattern``: a regular expression for the path's end, or after ``^`` for all of it.

    The brackets of a slice, ``"c_attn[q]"``, need no backslashes.

    Raises:
        ConfigError: It is no regular expression, or takes too many steps (see `lorakit.core.expressions`).
    """
    if key.endswith("]") and ends_with(path, key):
        return True
    return expression(key, ending=True).matches(path)


def ends_with(path: str, entry: str) -> bool:
    """Whether an entry of a list names this path."""
    return path == entry or path.endswith("." + entry)


def split_part(entry: str) -> tuple[str, str]:
    """``"c_attn[q]"`` as ``("c_attn", "q")``; the part is empty where there are no brackets at the end."""
    name, bracket, part = entry.partition("[")
    return (name, part[:-1]) if bracket and part.endswith("]") else (entry, "")


def entry_matches(entry: str, paths: Iterable[str]) -> list[str]:
    """The paths that an entry of a list names."""
    return [path for path in paths if ends_with(path, entry)]


def fullmatch(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that a regular expression matches whole.

    Raises:
        ConfigError: It is no regular expression, or takes too many steps (see `lorakit.core.expressions`).
    """
    known = expression(pattern)
    return [path for path in paths if known.matches(path)]


def unmatched(entry: str, paths: Sequence[str], *, what: str = "target") -> UnmatchedTargetError:
    """The error for an entry that names nothing, with the nearest names that would have."""
    ends = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
    hint = near_matches(split_part(entry)[0].rsplit(".", 1)[-1], ends)
    return UnmatchedTargetError(
        f"The {what} {entry!r} matches nothing in this model.{hint} It has: "
        f"{listing(sorted(ends), most=20) or 'no layer to adapt'}."
    )


def unmatched_expression(expression: str, paths: Sequence[str]) -> UnmatchedTargetError:
    """The error for a string that is neither a preset nor a regular expression for any path."""
    hint = near_matches(expression, PRESETS)
    if entry_matches(split_part(expression)[0], paths):
        hint = (
            " A string is a regular expression for the whole path; to name layers by their ending, give a list: "
            f"[{expression!r}]."
        )
    ends = sorted(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
    return UnmatchedTargetError(
        f"The target pattern {expression!r} matches nothing in this model.{hint} "
        f"Presets: {', '.join(PRESETS)}. Layers here: {listing(ends, most=20)}."
    )
