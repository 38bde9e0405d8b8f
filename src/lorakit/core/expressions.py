"""Regular expressions that strangers wrote: matched in bounded time, whatever they say.

Adapter files carry regular expressions (``target_modules``, ``rank_pattern``), and a server reads files of its users.
Python's `re` goes back and tries again: ``(a+)+$`` takes it years on forty letters. Here Python parses an expression,
and all of its matches are followed at once instead, as the set of places that each part can lead to (Thompson 1968,
"Regular expression search algorithm"); a set is the bits of one number (Baeza-Yates and Gonnet 1992, "A new approach to
text searching"). Steps are counted, and an expression that needs too many is refused, as are the expressions of one
file that need too many together (`lorakit.core.effort`). Only whether there is a match is asked, so greedy and lazy
repeats are the same. What depends on the text of an earlier match (a back-reference) cannot be followed so, and is
refused; `re` matches what has nothing to go back to.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from lorakit.core.effort import Effort, brief, current_effort, take_steps
from lorakit.errors import ConfigError

if sys.version_info >= (3, 11):
    from re import _compiler, _parser  # type: ignore[attr-defined]
else:
    import sre_compile as _compiler
    import sre_parse as _parser

LONGEST = 10_000
"""Characters in an expression. Plain names with ``|`` between them may be more: lorakit writes every layer so."""
_DEEPEST = 40  # groups, repeats and looks inside each other
_STEPS_OF_A_MATCH = 100_000
_STEPS_TO_READ = 40  # a character of an expression
_LETTERS_OF_A_STEP = 1024  # bits of a set that are handled in the time of a step
_LETTERS_COMPARED = 128  # letters that `re` compares in that time
_REMEMBERED = 200_000  # characters, of all expressions that are kept ready
_CHARACTERS = frozenset({"LITERAL", "NOT_LITERAL", "ANY", "IN"})
_NOTHING_TO_GO_BACK_TO = _CHARACTERS | {"AT"}
_REFUSED = {
    "GROUPREF": "a back-reference",
    "GROUPREF_EXISTS": "a choice by an earlier group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
}
_NAMES = re.compile(r"(?:[\w|-]|\\[^\w\s|])+")

Step = Callable[["_Walk", int], int]
"""From the places where a part of an expression may begin to those where it may end, as bits."""
Mask = Callable[["_Walk"], int]
"""The places of the letters that a part of an expression accepts, as bits."""


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
        self.text, self._ending = text, ending
        self._names: frozenset[str] | None = None
        self._quick: re.Pattern[str] | None = None
        self._step: Step
        if not ending and _NAMES.fullmatch(text):
            take_steps(1 + len(text) // _STEPS_TO_READ, text)
            self._names = frozenset(re.sub(r"\\(.)", r"\1", name) for name in text.split("|"))
            return
        if len(text) > LONGEST:
            raise ConfigError(
                f"The pattern {brief(text)} has {len(text):,} characters; at most {LONGEST:,} are read. "
                "Name the layers in a list instead."
            )
        take_steps(_STEPS_TO_READ * (4 + len(text)), text)
        try:
            whole = rf"(.*\.)?({text})$" if ending else text
            tree = _parser.parse(whole)
            if _is_quick(tree[1:] if ending and len(tree) == 3 else tree):
                self._quick = re.compile(whole)
            else:
                self._step = _Reading(text).sequence(tree, tree.state.flags, 0)
        except ConfigError:
            raise
        except (re.error, ValueError) as error:
            raise ConfigError(f"The pattern {brief(text)} is not a regular expression: {error}.") from None
        except (RecursionError, OverflowError):
            raise _too_deep(text) from None

    def matches(self, path: str) -> bool:
        """Whether it matches a path.

        Raises:
            ConfigError: That takes too many steps, alone or with the other patterns of its file.
        """
        if self._names is not None:
            take_steps(1, self.text, path)
            return path in self._names
        if self._quick is not None:
            tries = 1 + path.count(".") if self._ending else 1
            take_steps(1 + (len(path) + tries * len(self.text)) // _LETTERS_COMPARED, self.text, path)
            return self._quick.fullmatch(path) is not None
        walk = _Walk(path, self.text)
        try:
            return bool(self._step(walk, 1) >> len(path) & 1)
        finally:
            walk.settle()


_known: dict[tuple[str, bool], Expression] = {}


def expression(text: str, *, ending: bool = False) -> Expression:
    """The expression that a text is; remembered, so that matching it with many paths reads it once.

    Raises:
        ConfigError: See `Expression`.
    """
    found = _known.get((text, ending))
    if found is None:
        found = Expression(text, ending=ending)
        if sum(len(known) for known, _ in list(_known)) + len(text) > _REMEMBERED:
            _known.clear()
        _known[text, ending] = found
    return found


class _Walk:
    """One match: the text, the places of its letters, and how many steps it may still take."""

    def __init__(self, text: str, pattern: str) -> None:
        if len(text) > LONGEST:
            raise ConfigError(
                f"{brief(text)} has {len(text):,} characters; expressions are matched with at most {LONGEST:,}."
            )
        self.text, self.pattern = text, pattern
        self.letters = _places(text)
        self.masks: dict[Mask, int] = {}
        self._weight = 1 + len(text) // _LETTERS_OF_A_STEP
        shared = current_effort()
        self._shared = Effort(_STEPS_OF_A_MATCH) if shared is None else shared
        self._allowed = min(_STEPS_OF_A_MATCH, self._shared.left)
        self._own = Effort(self._allowed)
        self.count(1 + len(text) // 4)

    def count(self, steps: int) -> None:
        self._own.take(steps * self._weight, self.pattern, self.text)

    def settle(self) -> None:
        """Count what was taken against what the file may take."""
        self._shared.left -= self._allowed - self._own.left


@lru_cache(maxsize=4)  # the same path is asked about many patterns one after the other
def _places(text: str) -> dict[str, int]:
    """Letter to the places where a text has it, as bits."""
    places: dict[str, int] = {}
    for place, letter in enumerate(text):
        places[letter] = places.get(letter, 0) | 1 << place
    return places


def _too_deep(text: str) -> ConfigError:
    return ConfigError(
        f"The pattern {brief(text)} nests too deeply or counts too far: write it more plainly, or name the layers in "
        "a list."
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


class _Reading:
    """From what Python has parsed to steps; equal characters share theirs."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._masks: dict[tuple[str, int], Mask] = {}
        self._moves: dict[Mask, Step] = {}

    def sequence(self, tree: Any, flags: int, depth: int) -> Step:
        """One part after the other."""
        if depth > _DEEPEST:
            raise _too_deep(self._pattern)
        steps = [self._part(str(code), value, (code, value), flags, depth + 1) for code, value in tree]

        def follow(walk: _Walk, at: int) -> int:
            taken = 1  # nothing is a step too, or it could be repeated for ever
            for step in steps:
                if not at:
                    break
                at = step(walk, at)
                taken += 1
            walk.count(taken)
            return at

        return follow

    def _part(self, code: str, value: Any, node: Any, flags: int, depth: int) -> Step:
        if code in _CHARACTERS:
            return self._move(self._mask(node, flags))
        if code == "AT":
            return _position(node, flags)
        if code == "SUBPATTERN":
            _, added, removed, inside = value
            if added & _parser.TYPE_FLAGS:
                flags &= ~_parser.TYPE_FLAGS
            return self.sequence(inside, (flags | added) & ~removed, depth)
        if code == "BRANCH":
            return _branch([self.sequence(way, flags, depth) for way in value[1]])
        if code in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = value
            run = None
            if len(body) == 1 and str(body[0][0]) in _CHARACTERS and most == _parser.MAXREPEAT:
                run = self._mask(body[0], flags)
            return _repeat(self.sequence(body, flags, depth), least, most, run)
        if code in ("ASSERT", "ASSERT_NOT"):
            direction, inside = value
            back, widest = inside.getwidth() if direction < 0 else (0, 0)
            if back != widest:
                raise re.error("look-behind requires fixed-width pattern")
            return _around(self.sequence(inside, flags, depth), direction, back, code == "ASSERT")
        if code == "FAILURE":  # (?!)
            return lambda walk, at: 0
        raise ConfigError(
            f"The pattern {brief(self._pattern)} has {_REFUSED.get(code, code)}, which cannot be matched in bounded "
            "time: write it without, or name the layers in a list."
        )

    def _mask(self, node: Any, flags: int) -> Mask:
        key = repr(node), flags
        if key not in self._masks:
            self._masks[key] = _accepted(node, flags)
        return self._masks[key]

    def _move(self, mask: Mask) -> Step:
        return self._moves.setdefault(mask, lambda walk, at: (at & mask(walk)) << 1)


def _alone(node: Any, flags: int) -> re.Pattern[str]:
    """One node of an expression as an expression."""
    state = _parser.State()
    state.flags = flags
    compiled: re.Pattern[str] = _compiler.compile(_parser.SubPattern(state, [node]))
    return compiled


def _accepted(node: Any, flags: int) -> Mask:
    if str(node[0]) == "LITERAL" and not flags & re.IGNORECASE:
        wanted = chr(node[1])
        return lambda walk: walk.letters.get(wanted, 0)
    accepts = _alone(node, flags).fullmatch

    def mask(walk: _Walk) -> int:
        known = walk.masks.get(mask)
        if known is None:
            walk.count(len(walk.letters))
            known = sum(bits for letter, bits in walk.letters.items() if accepts(letter))
            walk.masks[mask] = known
        return known

    return mask


def _chosen(walk: _Walk, at: int, holds: Callable[[int], bool]) -> int:
    """The places, of some, where something holds."""
    left, kept = at, 0
    while left:
        walk.count(1)
        lowest = left & -left
        if holds(lowest.bit_length() - 1):
            kept |= lowest
        left ^= lowest
    return kept


def _position(node: Any, flags: int) -> Step:
    holds = _alone(node, flags).match
    return lambda walk, at: _chosen(walk, at, lambda place: holds(walk.text, place) is not None)


def _branch(ways: list[Step]) -> Step:
    def follow(walk: _Walk, at: int) -> int:
        ends = 0
        for way in ways:
            ends |= way(walk, at)
        return ends

    return follow


def _repeat(body: Step, least: int, most: int, run: Mask | None) -> Step:
    """A repeat; ``run`` is what its body accepts, if that is one character and has no most times."""

    def follow(walk: _Walk, at: int) -> int:
        # A place is reached by moves forward and by repeats of nothing. After more repeats than there are letters some
        # were of nothing, and one more or less of those leads to the same places.
        enough = len(walk.text) + 1
        for _ in range(min(least, enough)):
            at = body(walk, at)
            if not at:
                return at
        if run is not None:  # the sum carries each place to the end of its run of accepted letters
            letters = run(walk)
            return at | (((at & letters) + letters) ^ letters)
        ends = fresh = at
        for _ in range(min(most - least, enough)):
            fresh = body(walk, fresh) & ~ends
            if not fresh:
                break
            ends |= fresh
        return ends

    return follow


def _around(inside: Step, direction: int, back: int, wanted: bool) -> Step:
    """A look ahead, or behind by a known width."""

    def follow(walk: _Walk, at: int) -> int:
        def holds(place: int) -> bool:
            if place < back:
                return not wanted
            ends = inside(walk, 1 << (place - back))
            return bool(ends >> place & 1 if direction < 0 else ends) == wanted

        return _chosen(walk, at, holds)

    return follow
