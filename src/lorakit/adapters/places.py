"""Where targets stand in a model, read from their paths: in which layer, and as what in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorakit.core.endings import shortest_endings


@dataclass(frozen=True)
class Place:
    """A target's place.

    Attributes:
        layer: The path of the layer, ``"model.layers.3"``; empty for what is in none, such as a head.
        number: Its number there.
        kind: What the target is in its layer, by the shortest ending that tells it from other kinds: ``"q_proj"``.
    """

    layer: str
    number: int | None
    kind: str


def places(paths: Iterable[str]) -> dict[str, Place]:
    """Path to place. What counts layers is the first number that differs between targets which are otherwise alike.

    Later numbers that differ (experts, blocks within a block) belong to the kind as ``*``; numbers that never differ
    (``to_out.0``) stand in it as they are.
    """
    split = {path: path.split(".") for path in dict.fromkeys(paths)}
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for parts in split.values():
        alike.setdefault(_form(parts), []).append(parts)
    varying = {
        form: [n for n, part in enumerate(form) if part == "*" and len({parts[n] for parts in group}) > 1]
        for form, group in alike.items()
    }
    found: dict[str, tuple[str, int | None, str]] = {}
    for path, parts in split.items():
        numbers = varying[_form(parts)]
        rest = ["*" if n in numbers else part for n, part in enumerate(parts)]
        if numbers:
            first = numbers[0]
            found[path] = ".".join(parts[: first + 1]), int(parts[first]), ".".join(rest[first + 1 :])
        else:
            found[path] = "", None, path
    brief = shortest_endings(kind for _, _, kind in found.values())
    for kind, name in brief.items():
        if name in ("weight", "bias"):  # of what?
            brief[kind] = ".".join(kind.split(".")[-2:])
    return {path: Place(layer, number, brief[kind]) for path, (layer, number, kind) in found.items()}


def _form(parts: list[str]) -> tuple[str, ...]:
    return tuple("*" if part.isdecimal() else part for part in parts)
