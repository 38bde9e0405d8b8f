"""Naming targets as briefly as is unambiguous: by the endings of their paths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def endings(path: str) -> list[str]:
    """A path's endings from a dot on, the shortest first and the path itself last."""
    parts = path.split(".")
    return [".".join(parts[n:]) for n in range(len(parts) - 1, -1, -1)]


def shortest_endings(paths: Iterable[str]) -> dict[str, str]:
    """Path to its shortest ending that no other of the paths has; the path itself where there is none."""
    listed = list(dict.fromkeys(paths))
    count = Counter(ending for path in listed for ending in endings(path))
    return {path: next((e for e in endings(path) if count[e] == 1), path) for path in listed}


def smallest_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A default, and a pattern for the targets that have another value.

    A key is the shortest ending of a path that no target with another value shares; where there is none, the whole path
    anchored with ``^``.
    """
    if not values:
        return 8, {}
    default = Counter(values.values()).most_common(1)[0][0]
    if all(value == default for value in values.values()):
        return default, {}
    shared: dict[str, set[Any]] = {}
    for path, value in values.items():
        for ending in endings(path):
            shared.setdefault(ending, set()).add(value)
    pattern: dict[str, Any] = {}
    for path, value in values.items():
        if value == default:
            continue
        brief = next((ending for ending in endings(path) if shared[ending] == {value}), None)
        pattern["^" + re.escape(path) if brief is None else re.escape(brief)] = value
    return default, pattern
