"""Which target each group of keys in a PEFT file belongs to, and under which rule."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.core.effort import take_steps
from lorakit.core.expressions import Expression, expression
from lorakit.core.selection import ends_with
from lorakit.errors import AdapterFileError, listing
from lorakit.io.embedded import Embedded
from lorakit.io.outline import Outline
from lorakit.io.peft_keys import Found
from lorakit.io.peft_rules import (
    ATTENTION_IN,
    ATTENTION_OUT,
    CONV,
    EMBEDDING,
    LINEAR,
    PARAMETER,
    Rule,
    convention,
    natural,
)


@dataclass(frozen=True)
class Site:
    """A target as it stands in the file.

    Attributes:
        path: The target's path, as `AdapterState` names it.
        rule: How its tensors are kept.
        group: Its tensors, by their names in the file.
        settled_at: The path that the rank and alpha patterns are asked about.
        start: What its keys start with, for messages.
        stored: For a bare parameter whose size is known: that size.
        transposed: For a bare parameter: kept as ``(experts, in, out)``.
    """

    path: str
    rule: Rule
    group: Mapping[str, Found]
    settled_at: str
    start: str
    stored: tuple[int, ...] | None = None
    transposed: bool = False


def unwrapped(path: str, wrappers: Collection[str]) -> tuple[str, int]:
    """A module's own path, and how many wrappers' ``base_layer`` it ends with.

    A ``base_layer`` is PEFT's only where it follows the path of a wrapped module; a model may have its own.
    """
    if "base_layer" not in path:
        return path, 0
    own: list[str] = []
    so_far, trailing = "", 0
    for part in path.split("."):
        if part == "base_layer" and so_far in wrappers:
            trailing += 1
        else:
            own.append(part)
            trailing = 0
        so_far = f"{so_far}.{part}" if so_far else part
    return ".".join(own), trailing


def find_sites(
    factors: Mapping[str, Mapping[str, Found]],
    config: Mapping[str, Any],
    embedded: Embedded | None,
    outline: Outline | None,
) -> list[Site]:
    """The low-rank targets of a file, in the natural order of their paths.

    Raises:
        AdapterFileError: It cannot be told which parameter some tensors belong to.
    """
    levels: dict[str, dict[int, str]] = {}
    for start in factors:
        path, level = unwrapped(start, factors)
        levels.setdefault(path, {})[level] = start
    bare = {
        path: names
        for path in levels
        if (names := _parameters(path, levels, config, embedded, outline)) is not None
    }
    sites: list[Site] = []
    for path in sorted(levels, key=natural):
        start = levels[path][min(levels[path])]
        parent, _, name = path.rpartition(".")
        if path in bare:
            sites.extend(_parameter_sites(path, bare[path], levels[path], factors))
        elif (
            name == "out_proj"
            and parent in levels
            and parent not in bare
            and start.endswith(".base_layer.out_proj")
        ):
            sites.append(Site(path, ATTENTION_OUT, factors[start], parent, start))
        elif f"{path}.out_proj" in levels and f"{start}.base_layer.out_proj" in factors:
            sites.append(Site(f"{path}.in_proj_weight", ATTENTION_IN, factors[start], path, start))
        else:
            sites.append(Site(path, _layer_rule(factors[start]), factors[start], path, start))
    return sites


def _layer_rule(group: Mapping[str, Found]) -> Rule:
    if "embedding_A" in group or "embedding_B" in group:
        return EMBEDDING
    return CONV if any(n in group and group[n].tensor.dim() > 2 for n in ("lora_A", "lora_B")) else LINEAR


Named = list[tuple[str, "tuple[int, ...] | None", bool]]


def _parameters(
    path: str,
    levels: Mapping[str, Mapping[int, str]],
    config: Mapping[str, Any],
    embedded: Embedded | None,
    outline: Outline | None,
) -> Named | None:
    """The adapted bare parameters of a module, innermost first: name, size and orientation; None for a layer."""
    entries = config["target_parameters"]
    if not entries:
        if len(levels[path]) > 1:
            raise AdapterFileError(
                f"{path!r} has tensors under '.base_layer', but the configuration names no target_parameters."
            )
        return None
    if embedded is not None and path in embedded.parameters:
        return [(name, tuple(size), bool(swap)) for name, size, swap in embedded.parameters[path]]
    if outline is not None and path in outline.owned:
        owned = outline.owned[path]
        names = [n for n in owned if any(ends_with(f"{path}.{n}", entry) for entry in entries)]
        swap = path in outline.transposed
        return [
            (n, outline.sizes[f"{path}.{n}"], swap and len(outline.sizes[f"{path}.{n}"]) == 3) for n in names
        ] or None
    sure = {name for owner, name in map(_split, entries) if owner and ends_with(path, owner)}
    possible = sure | {name for owner, name in map(_split, entries) if not owner}
    if not possible or (len(levels[path]) == 1 and not sure and selected(path, config["target_modules"])):
        return None
    named = sure if len(sure) == len(levels[path]) else possible
    ordered = convention(sorted(named))
    if ordered is None:
        raise AdapterFileError(
            f"{path!r} has adapted parameters {listing(sorted(named))}. PEFT numbers them in the order in "
            "which the module holds "
            "them, which the file does not say. Load it onto the model (lorakit.load), or read it with an "
            "outline of the model."
        )
    return [(name, None, False) for name in ordered]


def _split(entry: str) -> tuple[str, str]:
    owner, _, name = entry.rpartition(".")
    return owner, name


def selected(path: str, selector: Any) -> bool:
    """Whether PEFT's ``target_modules`` names a path: a list of endings, or an expression for the whole."""
    if isinstance(selector, str):
        return expression(selector).matches(path)
    return any(ends_with(path, entry) for entry in selector or ())


def _parameter_sites(
    path: str, named: Named, levels: Mapping[int, str], factors: Mapping[str, Mapping[str, Found]]
) -> list[Site]:
    if sorted(levels) != list(range(len(named))):
        raise AdapterFileError(
            f"The file has {len(levels)} adapted parameters of {path!r}, the configuration names "
            f"{len(named)}: "
            f"{listing(name for name, _, _ in named)}."
        )
    sites = []
    for level, (name, stored, swap) in zip(reversed(range(len(named))), named, strict=True):
        start, full = levels[level], f"{path}.{name}"
        sites.append(Site(full, PARAMETER, factors[start], full, start, stored, swap))
    return sites


class Patterns:
    """``rank_pattern`` or ``alpha_pattern``: the value for a path, by the first key that matches it.

    Keys that are nothing but names and dots, an ending or after ``^`` a whole path, are looked up and not tried one by
    one: a file may have one for each of its targets.

    Raises:
        ConfigError: A key is no regular expression, or all together take too long (see `lorakit.core.expressions`).
    """

    def __init__(self, pattern: Mapping[str, Any], default: Any) -> None:
        self._default, self._any = default, bool(pattern)
        self._whole, self._endings = _Names(), _Names()
        self._expressions: list[tuple[int, str, Expression, Any]] = []
        for place, (key, value) in enumerate(pattern.items()):
            text = key.removeprefix("^")
            if _PLAIN.fullmatch(text):
                (self._endings if text == key else self._whole).add(text, (place, value))
            else:
                self._expressions.append((place, key, Expression(key, ending=True), value))

    def __getitem__(self, path: str) -> Any:
        if not self._any:
            return self._default
        hits = [*self._whole.of(path, endings=False), *self._endings.of(path, endings=True)]
        place, value = min(hits, key=lambda hit: hit[0], default=(None, self._default))
        for at, key, known, other in self._expressions:
            if place is not None and at > place:
                break
            if (key.endswith("]") and ends_with(path, key)) or known.matches(path):
                return other
        return value


_PLAIN = re.compile(r"(?:[\w.-]|\\[^\w\s])+")


class _Names:
    """Plain keys by their length and by where they have dots without a backslash, which stand for any character."""

    def __init__(self) -> None:
        self._tables: dict[int, dict[tuple[int, ...], dict[str, tuple[int, Any]]]] = {}

    def add(self, key: str, hit: tuple[int, Any]) -> None:
        letters = re.findall(r"\\?.", key)
        dots = tuple(n for n, letter in enumerate(letters) if letter == ".")
        name = "".join(letter[-1] for letter in letters)
        self._tables.setdefault(len(name), {}).setdefault(dots, {}).setdefault(name, hit)

    def of(self, path: str, *, endings: bool) -> Iterator[tuple[int, Any]]:
        """What was added for a path or, if asked, for an ending of it."""
        for length, tables in self._tables.items():
            take_steps(1, "", path)
            if length == len(path) or (endings and path[-length - 1 : -length] == "."):
                for dots, names in tables.items():
                    take_steps(4 + length // 4, next(iter(names)), path)
                    letters = list(path[-length:])
                    for n in dots:
                        letters[n] = "."
                    if (hit := names.get("".join(letters))) is not None:
                        yield hit
