"""What a table is made of: columns that know how people speak about them, and rows drawn from value pools.

A column's kind says which questions make sense: a `Key` names the row, a `Category` is shared by several
rows, a `Measure` is a quantity ("a height of 300"), a `Tally` counts something ("12 goals") and a `Year` is a
point in time ("opened in 1990").
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from functools import cached_property

from .dice import Dice
from .query import Value


@dataclass(frozen=True)
class Verb:
    """The forms of a verb: "players who *scored*", "the player who *scored*", "how many *did* X *score*"."""

    plural: str
    singular: str
    base: str
    auxiliary: str


HAS = Verb("have", "has", "have", "does")


def past(base: str, form: str) -> Verb:
    """A verb used in the past tense: `past("score", "scored")`."""
    return Verb(form, form, base, "did")


def present(base: str, singular: str) -> Verb:
    """A verb used in the present tense: `present("cost", "costs")`."""
    return Verb(base, singular, base, "does")


@dataclass(frozen=True)
class Key:
    """The text that names a row, different in every row. `pool` holds one value a row, separated by commas."""

    name: str
    pool: str
    noun: str = "name"
    type: str = "TEXT"

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(self.pool.split(", "))

    def draw(self, count: int, dice: Dice) -> list[Value]:
        return list(dice.sample(self.values, count))


@dataclass(frozen=True)
class Category:
    """Text shared by several rows.

    Attributes:
        noun, plural: "country", "countries".
        pool: the values, separated by commas.
        before: how a value stands before the row's noun: "{}" for "red cars".
        after: how a value stands behind it: "in {}" for "cities in Peru".
        predicate: what follows "are" when the category is told of the rows ("cars that are red"); "" when
            nothing natural does.
        asks: questions for the value of one row, the row's name at "{}".
    """

    name: str
    noun: str
    plural: str
    pool: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    predicate: str = ""
    asks: tuple[str, ...] = ()
    type: str = "TEXT"

    @property
    def values(self) -> tuple[str, ...]:
        return tuple(self.pool.split(", "))

    def draw(self, count: int, dice: Dice) -> list[Value]:
        """Each value once or more, some clearly more often than others, so that groups differ in size."""
        ranked = dice.shuffled(self.values)
        extra = [
            ranked[min(dice.below(len(ranked)), dice.below(len(ranked)))] for _ in range(count - len(ranked))
        ]
        return list(dice.shuffled(ranked + extra))


@dataclass(frozen=True)
class Grid:
    """Evenly spaced numbers, `low` to `high` inclusive. A fractional step makes a REAL column with one decimal."""

    low: float
    high: float
    step: float = 1

    @property
    def type(self) -> str:
        return "INT" if float(self.step).is_integer() else "REAL"

    def values(self) -> list[int | float]:
        count = round((self.high - self.low) / self.step) + 1
        points = [self.low + index * self.step for index in range(count)]
        return (
            [int(point) for point in points] if self.type == "INT" else [round(point, 1) for point in points]
        )

    def draw(self, count: int, dice: Dice) -> list[Value]:
        """Different numbers where the grid is wide enough; on a narrow grid some rows share one."""
        values = self.values()
        if len(values) >= 2 * count:
            return list(dice.sample(values, count))
        return [dice.choice(values) for _ in range(count)]


@dataclass(frozen=True)
class Measure:
    """A quantity with a size.

    Attributes:
        nouns: what it is called, the commonest first: ("price", "cost").
        grid: the numbers it takes.
        unit: a number with its unit: "{} meters", "${}".
        big, small: adjective and its degrees for a large and a small value, ("tall", "taller", "tallest"); ()
            when there is none. The first word of `small` is not used.
        verb: "cost" for "laptops that cost more than 900".
        extremes: the superlatives that go with the noun: "the highest price", "the lowest price".
        additive: whether a sum over rows means something.
        asks: questions for the value of one row, the row's name at "{}".
    """

    name: str
    nouns: tuple[str, ...]
    grid: Grid
    unit: str = "{}"
    big: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    verb: Verb | None = None
    extremes: tuple[str, str] = ("highest", "lowest")
    additive: bool = False
    asks: tuple[str, ...] = ()

    @property
    def type(self) -> str:
        return self.grid.type

    def draw(self, count: int, dice: Dice) -> list[Value]:
        return self.grid.draw(count, dice)


@dataclass(frozen=True)
class Tally:
    """A count of things: `things` is their plural ("goals"), `verb` the natural verb ("scored")."""

    name: str
    things: str
    grid: Grid
    verb: Verb = HAS
    asks: tuple[str, ...] = ()

    @property
    def type(self) -> str:
        return self.grid.type

    def draw(self, count: int, dice: Dice) -> list[Value]:
        return self.grid.draw(count, dice)


@dataclass(frozen=True)
class Year:
    """A year in which something happened to the row.

    Attributes:
        nouns: "opening year".
        participle: "opened" for things ("museums opened in 1990"); "" when the rows act themselves.
        latest, earliest: superlative of a late and of an early year: "newest", "oldest"; "" when there is
            none.
        verb: "join" for people ("employees who joined in 2015").
    """

    name: str
    nouns: tuple[str, ...]
    grid: Grid
    participle: str = ""
    latest: str = ""
    earliest: str = ""
    verb: Verb | None = None

    @property
    def type(self) -> str:
        return self.grid.type

    def draw(self, count: int, dice: Dice) -> list[Value]:
        return self.grid.draw(count, dice)


Number = Measure | Tally | Year
Column = Key | Category | Measure | Tally | Year


@dataclass(frozen=True)
class Table:
    """A table: its name in SQL, how its rows are called, and its columns (the first one is the key).

    Attributes:
        person: whether the rows are people ("who" instead of "that").
    """

    name: str
    singular: str
    plural: str
    columns: tuple[Column, ...]
    person: bool = False

    @property
    def key(self) -> Key:
        key = self.columns[0]
        assert isinstance(key, Key)
        return key

    @property
    def categories(self) -> tuple[Category, ...]:
        return tuple(column for column in self.columns if isinstance(column, Category))

    @property
    def numbers(self) -> tuple[Number, ...]:
        return tuple(column for column in self.columns if isinstance(column, Measure | Tally | Year))

    def column(self, name: str) -> Column:
        """The column of that name."""
        return next(column for column in self.columns if column.name == name)

    @cached_property
    def rows(self) -> tuple[tuple[Value, ...], ...]:
        """The table's rows, always the same: they depend on the table's name and pools only."""
        count = len(self.key.values)
        drawn = [column.draw(count, Dice("rows", self.name, column.name)) for column in self.columns]
        return tuple(zip(*drawn, strict=True))

    def schema(self) -> str:
        """The compact schema shown to the model: `cities(name TEXT, country TEXT, population INT)`."""
        return f"{self.name}({', '.join(f'{column.name} {column.type}' for column in self.columns)})"

    def connect(self) -> sqlite3.Connection:
        """A new in-memory SQLite database that holds this table and its rows."""
        connection = sqlite3.connect(":memory:")
        connection.execute(f"CREATE TABLE {self.schema()}")
        connection.executemany(
            f"INSERT INTO {self.name} VALUES ({', '.join('?' * len(self.columns))})", self.rows
        )
        connection.commit()
        return connection
