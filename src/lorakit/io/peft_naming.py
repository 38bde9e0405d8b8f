"""How a PEFT configuration names targets, ranks, modules and tokens: as briefly as is unambiguous."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.core.endings import endings
from lorakit.core.selection import ends_with
from lorakit.errors import ConfigError
from lorakit.io.outline import Outline
from lorakit.io.peft_config import SELECTION
from lorakit.io.peft_rules import natural
from lorakit.io.peft_sites import selected


@dataclass(frozen=True)
class Naming:
    """PEFT's paths: what it wraps becomes a child ``base_layer`` of the wrapper.

    Attributes:
        wrappers: Module path to how often it is wrapped, for modules that have children or several wrappers.
    """

    wrappers: Mapping[str, int]

    def start(self, path: str) -> str:
        """A module's path in the model as PEFT has wrapped it, without what wraps the module itself."""
        if not self.wrappers:
            return path
        parts = path.split(".")
        named: list[str] = []
        for n, part in enumerate(parts, 1):
            named.append(part)
            if n < len(parts):
                named += ["base_layer"] * self.wrappers.get(".".join(parts[:n]), 0)
        return ".".join(named)

    def inside_wrapper(self, path: str) -> bool:
        """Whether a module lies below one that is wrapped."""
        return any(path.startswith(wrapper + ".") for wrapper in self.wrappers)


def number(value: float) -> float | int:
    """A whole number as PEFT writes it."""
    return int(value) if float(value).is_integer() else value


def target_modules(paths: Sequence[str], hints: Mapping[str, Any], outline: Outline | None) -> dict[str, Any]:
    """The setting ``target_modules``, and its companions, that name these modules.

    What the adapter was read with is given back if it still names all of them. Else: with an outline,
    endings of paths if
    no other module shares them; without, whole paths, or an expression where a whole path could be the end of another.
    """
    if not paths:
        return {"target_modules": []}
    given = hints.get("target_modules")
    if given is not None and given != "all-linear" and all(_selected(path, given) for path in paths):
        return {key: hints[key] for key in SELECTION if key in hints}
    if outline is not None:
        last = sorted({path.rpartition(".")[2] for path in paths})
        if _only(last, paths, outline):
            return {"target_modules": last}
    ordered = sorted(paths, key=natural)
    if _only(ordered, paths, outline) if outline is not None else all("." in path for path in paths):
        return {"target_modules": ordered}
    return {"target_modules": "|".join(re.escape(path) for path in ordered)}


def parameter_list(paths: Sequence[str], hints: Mapping[str, Any]) -> list[str] | None:
    """The setting ``target_parameters``."""
    if not paths:
        return None
    given = hints.get("target_parameters")
    if given and all(any(ends_with(path, entry) for entry in given) for path in paths):
        return list(given)
    return sorted(paths, key=natural)


def module_list(modules: Sequence[str], hints: Mapping[str, Any]) -> list[str] | None:
    """The setting ``modules_to_save``."""
    if not modules:
        return None
    given = hints.get("modules_to_save")
    if given and all(any(f".{entry}." in f".{m}." or m.endswith(entry) for entry in given) for m in modules):
        return list(given)
    return sorted(modules, key=natural)


def token_indices(
    ids: Mapping[str, list[int]], hints: Mapping[str, Any]
) -> list[int] | dict[str, list[int]] | None:
    """The setting ``trainable_token_indices``: by table, unless it was read as a list for the input embedding."""
    if not ids:
        return None
    given = hints.get("trainable_token_indices")
    if isinstance(given, list) and list(ids.values()) == [given]:
        return given
    if isinstance(given, Mapping) and all(
        any(path.endswith(entry) and rows == value for entry, value in given.items())
        for path, rows in ids.items()
    ):
        return dict(given)
    return dict(ids)


def _only(entries: Sequence[str], paths: Sequence[str], outline: Outline) -> bool:
    """Whether entries of a list name these modules of the model and no others."""
    ends: dict[str, int] = {}
    wanted = set(paths)
    for module in {*outline.owned, *wanted}:
        for ending in endings(module):
            ends[ending] = ends.get(ending, 0) + (module not in wanted)
    return all(not ends.get(entry, 0) for entry in entries)


def _selected(path: str, selector: Any) -> bool:
    try:
        return selected(path, selector)
    except ConfigError:  # what is written instead names the layers
        return False
