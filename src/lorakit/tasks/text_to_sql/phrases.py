"""The pieces of a question: how people say a condition, a group of rows, a column and an extreme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Literal

from .dice import Dice
from .query import Condition, Value
from .schema import HAS, Category, Column, Key, Measure, Number, Table, Tally, Verb, Year

Place = Literal["before", "after", "with", "whose", "that"]
_ORDER: tuple[Place, ...] = ("before", "after", "with", "whose", "that")
_COUNTS = ("zero", "one", "two", "three", "four", "five")


@dataclass(frozen=True)
class Phrase:
    """A condition in words.

    Attributes:
        place: where it stands: "before" the noun ("red"), "after" it ("in Peru"), or behind it, opened by the
            word "with", "whose" or "that"; the text of these three comes without the opening word.
        text: the words when many rows are meant.
        singular: the words when one row is meant.
        predicate: the words as a predicate of many rows ("are in Peru", "have more than 3 parks"); "" when
            there is no natural one.
    """

    place: Place
    text: str
    singular: str
    predicate: str = ""


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(words: Sequence[str]) -> str:
    """Words joined by commas and a final "and"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def count_word(count: int, dice: Dice) -> str:
    """A small count, in digits or spelled out."""
    return _COUNTS[count] if count < len(_COUNTS) and dice.chance(0.4) else str(count)


def _after(text: str, copula: str = "are") -> Phrase:
    clause = text.split(" ", 1)[1] if text.startswith(("that ", "who ")) else ""
    return Phrase("after", text, text, clause or f"{copula} {text}")


def _with(text: str) -> Phrase:
    return Phrase("with", text, text, f"have {text}")


def _whose(text: str) -> Phrase:
    return Phrase("whose", text, text)


def _that(verb: Verb, rest: str) -> Phrase:
    return Phrase("that", f"{verb.plural} {rest}", f"{verb.singular} {rest}", f"{verb.plural} {rest}")


@singledispatch
def condition_phrases(column: Column, condition: Condition, dice: Dice) -> list[Phrase]:
    """All the ways to say that a column meets a condition."""
    raise TypeError(f"no wording for a {type(column).__name__}")


@condition_phrases.register
def _(column: Key, condition: Condition, dice: Dice) -> list[Phrase]:
    pattern = str(condition.value)
    text = pattern.strip("%")
    if not pattern.startswith("%"):
        verb, preposition = Verb("start", "starts", "start", "does"), "starting"
    elif not pattern.endswith("%"):
        verb, preposition = Verb("end", "ends", "end", "does"), "ending"
    else:
        quoted = f'"{text}"'
        return [
            _whose(f"{column.noun} contains {quoted}"),
            _whose(f"{column.noun} includes {quoted}"),
            Phrase(
                "with",
                f"{quoted} in the {column.noun}",
                f"{quoted} in the {column.noun}",
                f"have {quoted} in the {column.noun}",
            ),
        ]
    return [
        _whose(f"{column.noun} {verb.singular} with {text}"),
        _whose(f'{column.noun} {verb.singular} with "{text}"'),
        _with(f"{article(column.noun)} {preposition} with {text}"),
        _with(f'{article(column.noun)} {preposition} with "{text}"'),
    ]


@condition_phrases.register
def _(column: Category, condition: Condition, dice: Dice) -> list[Phrase]:
    value = condition.value
    options = [_whose(f"{column.noun} is {value}")]
    for pattern in column.before:
        text = pattern.format(value)
        predicate = f"are {column.predicate.format(value)}" if column.predicate else ""
        options += [Phrase("before", text, text, predicate)] * 3
    for pattern in column.after:
        options += [_after(pattern.format(value))] * 3
    return options


_MEASURE_NOUN = {
    ">": ("above {}", "over {}", "of more than {}", "greater than {}"),
    "<": ("below {}", "under {}", "of less than {}", "lower than {}"),
    ">=": ("of at least {}", "of {} or more", "of no less than {}"),
    "<=": ("of at most {}", "of {} or less", "of no more than {}"),
    "=": ("of {}", "of exactly {}", "equal to {}"),
}
_MEASURE_IS = {
    ">": ("is above {}", "is more than {}", "is greater than {}", "exceeds {}", "is over {}"),
    "<": ("is below {}", "is less than {}", "is lower than {}", "is under {}"),
    ">=": ("is at least {}", "is {} or more"),
    "<=": ("is at most {}", "is {} or less"),
    "=": ("is {}", "equals {}", "is exactly {}"),
}
_AMOUNT = {
    ">": ("more than {}", "over {}"),
    "<": ("less than {}", "under {}"),
    ">=": ("at least {}",),
    "<=": ("at most {}", "no more than {}"),
    "=": ("exactly {}",),
}
_TALLY = {
    ">": ("more than {} {}", "over {} {}"),
    "<": ("fewer than {} {}", "less than {} {}"),
    ">=": ("at least {} {}", "{} or more {}"),
    "<=": ("at most {} {}", "no more than {} {}", "{} or fewer {}"),
    "=": ("exactly {} {}", "{} {}"),
}
_YEAR = {
    ">": ("after {}", "later than {}"),
    "<": ("before {}", "earlier than {}"),
    ">=": ("in {} or later", "since {}"),
    "<=": ("in {} or earlier", "up to {}"),
    "=": ("in {}",),
}


def _quantity(column: Measure, value: Value, dice: Dice) -> str:
    """The number, now and then with its unit."""
    return column.unit.format(value) if dice.chance(0.5) else str(value)


@condition_phrases.register
def _(column: Measure, condition: Condition, dice: Dice) -> list[Phrase]:
    value, operator = _quantity(column, condition.value, dice), condition.operator
    noun = dice.choice(column.nouns)
    options = [_with(f"{article(noun)} {dice.choice(_MEASURE_NOUN[operator]).format(value)}"),
               _whose(f"{noun} {dice.choice(_MEASURE_IS[operator]).format(value)}")]  # fmt: skip
    compared = column.unit.format(condition.value)
    comparative = {">": column.big, "<": column.small}.get(operator, ())
    if comparative:
        options += [_after(f"{comparative[1]} than {compared}")] * 2
    if column.verb:
        options += [_that(column.verb, dice.choice(_AMOUNT[operator]).format(compared))] * 2
    return options


@condition_phrases.register
def _(column: Tally, condition: Condition, dice: Dice) -> list[Phrase]:
    pattern = dice.choice(_TALLY[condition.operator])
    amount = pattern.format(condition.value, column.things)
    natural = 1 if column.verb == HAS else 2
    return [_with(amount), *[_that(column.verb, amount)] * natural]


@condition_phrases.register
def _(column: Year, condition: Condition, dice: Dice) -> list[Phrase]:
    time = dice.choice(_YEAR[condition.operator]).format(condition.value)
    if column.verb:
        return [_that(column.verb, time)]
    return [_after(f"{column.participle} {time}", "were")]


def rows_phrase(
    table: Table, phrases: Sequence[Phrase], *, many: bool, superlative: str = "", ending: str = ""
) -> str:
    """The rows that meet some conditions: "red cars from Volta with a price above 9000".

    Args:
        table: whose rows.
        phrases: the conditions, in the order of their places.
        many: whether the noun is in the plural.
        superlative: words put before everything: "tallest".
        ending: words put after everything: "with the most goals".
    """
    words = [superlative] if superlative else []
    words += [phrase.text for phrase in phrases if phrase.place == "before"]
    words.append(table.plural if many else table.singular)
    opening: Place = "before"
    for phrase in phrases:
        if phrase.place == "before":
            continue
        if phrase.place == opening:
            words.append("and")
        if phrase.place == "that":
            words += [] if opening == "that" else ["who" if table.person else "that"]
        elif phrase.place == "whose" or (phrase.place == "with" and opening != "with"):
            words.append(phrase.place)
        words.append(phrase.text if many else phrase.singular)
        opening = phrase.place
    return " ".join([*words, ending] if ending else words)


def in_order(phrases: Sequence[tuple[Condition, Phrase]]) -> list[tuple[Condition, Phrase]]:
    """Conditions in the order in which a sentence names them."""
    return sorted(phrases, key=lambda pair: _ORDER.index(pair[1].place))


def column_noun(column: Column, dice: Dice) -> str:
    """What one row's value in a column is called: "price", "number of goals"."""
    if isinstance(column, Tally):
        return f"number of {column.things}"
    if isinstance(column, Key | Category):
        return column.noun
    return dice.choice(column.nouns)


@dataclass(frozen=True)
class Extreme:
    """Ways to point at the row with the largest or the smallest value of a column.

    Attributes:
        adjective: "tallest"; "" when there is none.
        ending: behind the noun: "with the highest price".
        clause: as a predicate of one row: "has the highest price", "scored the most goals".
        clause_many: the same for many rows: "have the highest price".
    """

    adjective: str
    ending: str
    clause: str
    clause_many: str


def extreme(table: Table, column: Number, descending: bool, dice: Dice) -> Extreme:
    """How to point at the top (`descending`) or the bottom of a column."""
    if isinstance(column, Year):
        when = dice.choice(("most recently", "last") if descending else ("first", "earliest"))
        adjective = column.latest if descending else column.earliest
        if column.verb:
            clause = f"{column.verb.singular} {when}"
            return Extreme(adjective, f"{'who' if table.person else 'that'} {clause}", clause, clause)
        clause = f"{column.participle} {when}"
        return Extreme(adjective, clause, f"was {clause}", f"were {clause}")
    if isinstance(column, Tally):
        what = f"the {'most' if descending else 'fewest'} {column.things}"
        return Extreme("", f"with {what}", f"{column.verb.singular} {what}", f"{column.verb.plural} {what}")
    what = f"the {column.extremes[0 if descending else 1]} {dice.choice(column.nouns)}"
    degrees = column.big if descending else column.small
    return Extreme(degrees[2] if degrees else "", f"with {what}", f"has {what}", f"have {what}")
