"""Regular expressions that strangers wrote: matched in bounded time, whatever they say.

Adapter files carry regular expressions (``target_modules``, ``rank_pattern``), and a server reads files of its users.
Python's `re` goes back and tries again: ``(a+)+$`` takes it years on forty letters. Here Python parses an expression,
and all of its matches are followed at once instead, as the set of places that each part can lead to (Thompson 1968,
"Regular expression search algorithm"); steps are counted, and an expression that needs too many is refused. Only
whether there is a match is asked, so greedy and lazy repeats are the same. What depends on the text of an earlier match
(a back-reference) cannot be followed so, and is refused; `re` matches what has nothing to go back to.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from lorakit.errors import ConfigError

if sys.version_info >= (3, 11):
    from re import _compiler, _parser  # type: ignore[attr-defined]
else:
    import sre_compile as _compiler
    import sre_parse as _parser

LONGEST = 200_000
"""Characters in an expression; lorakit writes one that names every layer of a large model."""
_EFFORT, _MOST_STEPS = 64, 2_000_000
_CHARACTERS = frozenset({"LITERAL", "NOT_LITERAL", "ANY", "IN"})
_NOTHING_TO_GO_BACK_TO = _CHARACTERS | {"AT"}
_REFUSED = {
    "GROUPREF": "a back-reference",
    "GROUPREF_EXISTS": "a choice by an earlier group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
}

Step = Callable[["_Walk", "frozenset[int]"], "frozenset[int]"]
"""From the places where a part of an expression may begin to those where it may end."""


class Expression:
    """A regular expression, ready to be matched.

    Args:
        text: As `re` reads it.
        ending: Whether it is for the end of a path, after a dot or at its start, or after ``^`` for all of it, as PEFT
            reads the keys of ``rank_pattern``; otherwise for the whole path.

    Raises:
        ConfigError: It is no regular expression, is too long, or has what is not matched in bounded time.
    """

    def __init__(self, text: str, *, ending: bool = False) -> None:
        self.text = text
        if len(text) > LONGEST:
            raise ConfigError(
                f"The pattern {text[:60] + '...'!r} has {len(text):,} characters; at most {LONGEST:,} are read. "
                "Name the layers in a list instead."
            )
        try:
            whole = rf"(.*\.)?({text})$" if ending else text
            tree = _parser.parse(whole)
            quick = _is_quick(tree[1:] if ending and len(tree) == 3 else tree)
            self._quick = re.compile(whole) if quick else None
            self._step = None if self._quick else _sequence(tree, tree.state.flags, text)
        except re.error as error:
            raise ConfigError(f"The pattern {text!r} is not a regular expression: {error}.") from None
        except (RecursionError, OverflowError):
            raise ConfigError(
                f"The pattern {text[:60]!r} nests too deeply or counts too far: write it more plainly, or name the "
                "layers in a list."
            ) from None

    def matches(self, path: str) -> bool:
        """Whether it matches a path.

        Raises:
            ConfigError: That takes too many steps.
        """
        if self._quick is not None:
            return self._quick.fullmatch(path) is not None
        assert self._step is not None
        return len(path) in self._step(_Walk(path, self.text), frozenset({0}))


@lru_cache(maxsize=1024)
def expression(text: str, *, ending: bool = False) -> Expression:
    """The expression that a text is; remembered, so that matching it with many paths reads it once.

    Raises:
        ConfigError: See `Expression`.
    """
    return Expression(text, ending=ending)


class _Walk:
    """One match: the text, and how many steps it may still take."""

    def __init__(self, text: str, pattern: str) -> None:
        self.text, self.pattern = text, pattern
        self.left = min(_EFFORT * len(pattern) * (len(text) + 1), _MOST_STEPS)

    def count(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise ConfigError(
                f"The pattern {self.pattern[:200]!r} takes too many steps to be matched with {self.text[:200]!r}. Take "
                "repeats out of its repeats, or name the layers in a list."
            )


def _is_quick(tree: Any) -> bool:
    """Whether `re` has nothing to try again: no repeats, no choices."""
    for code, value in tree:
        if str(code) == "SUBPATTERN":
            if not _is_quick(value[-1]):
                return False
        elif str(code) not in _NOTHING_TO_GO_BACK_TO:
            return False
    return True


def _sequence(tree: Any, flags: int, pattern: str) -> Step:
    """One part after the other."""
    steps = [_part(str(code), value, (code, value), flags, pattern) for code, value in tree]

    def follow(walk: _Walk, at: frozenset[int]) -> frozenset[int]:
        for step in steps:
            if not at:
                break
            walk.count(len(at))
            at = step(walk, at)
        return at

    return follow


def _part(code: str, value: Any, node: Any, flags: int, pattern: str) -> Step:
    if code in _CHARACTERS:
        return _character(node, flags)
    if code == "AT":
        return _position(node, flags)
    if code == "SUBPATTERN":
        _, added, removed, inside = value
        return _sequence(inside, (flags | added) & ~removed, pattern)
    if code == "BRANCH":
        return _branch([_sequence(way, flags, pattern) for way in value[1]])
    if code in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, body = value
        return _repeat(_sequence(body, flags, pattern), least, most)
    if code in ("ASSERT", "ASSERT_NOT"):
        direction, inside = value
        back = inside.getwidth()[0] if direction < 0 else 0
        return _around(_sequence(inside, flags, pattern), direction, back, code == "ASSERT")
    raise ConfigError(
        f"The pattern {pattern!r} has {_REFUSED.get(code, code)}, which cannot be matched in bounded time: write it "
        "without, or name the layers in a list."
    )


def _alone(node: Any, flags: int) -> re.Pattern[str]:
    """One node of an expression as an expression."""
    state = _parser.State()
    state.flags = flags
    compiled: re.Pattern[str] = _compiler.compile(_parser.SubPattern(state, [node]))
    return compiled


def _character(node: Any, flags: int) -> Step:
    known: dict[str, bool] = {}
    accepts = _alone(node, flags).fullmatch

    def follow(walk: _Walk, at: frozenset[int]) -> frozenset[int]:
        text, ends = walk.text, []
        for place in at:
            if place == len(text):
                continue
            letter = text[place]
            if letter not in known:
                known[letter] = accepts(letter) is not None
            if known[letter]:
                ends.append(place + 1)
        return frozenset(ends)

    return follow


def _position(node: Any, flags: int) -> Step:
    holds = _alone(node, flags).match
    return lambda walk, at: frozenset(place for place in at if holds(walk.text, place))


def _branch(ways: Iterable[Step]) -> Step:
    ways = list(ways)
    return lambda walk, at: frozenset().union(*(way(walk, at) for way in ways))


def _repeat(body: Step, least: int, most: int) -> Step:
    def follow(walk: _Walk, at: frozenset[int]) -> frozenset[int]:
        # A place is reached by moves forward and by repeats of nothing. After more repeats than there are letters some
        # were of nothing, and one more or less of those leads to the same places.
        enough = len(walk.text) + 1
        for _ in range(min(least, enough)):
            at = body(walk, at)
            if not at:
                return at
        ends = fresh = at
        for _ in range(min(most - least, enough)):
            fresh = body(walk, fresh) - ends
            if not fresh:
                break
            ends |= fresh
        return ends

    return follow


def _around(inside: Step, direction: int, back: int, wanted: bool) -> Step:
    """A look ahead, or behind by a known width."""

    def holds(walk: _Walk, place: int) -> bool:
        if place < back:
            return False
        ends = inside(walk, frozenset({place - back}))
        return place in ends if direction < 0 else bool(ends)

    return lambda walk, at: frozenset(place for place in at if holds(walk, place) == wanted)
