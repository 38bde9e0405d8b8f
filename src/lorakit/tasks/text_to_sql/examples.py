"""Drawing examples: a table, a plan, a check that its answer says something, and a question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from sqlite3 import Connection

from lorakit.errors import ConfigError
from lorakit.tasks.execution import Case, Rows, run, same_result

from .dice import Dice
from .plans import Kind, draw_kind, draw_plan
from .query import Query
from .questions import word
from .rivals import rivals
from .schema import Table
from .tables import Split, tables

_TRIES = 40
_DRY_SPELL = 500


@dataclass(frozen=True)
class Example:
    """A question about a table, with the query that answers it.

    Attributes:
        id: names the example: `SPLIT-SEED-NUMBER`.
        kind: the construct that is asked for ("filter", "superlative", ...).
        table: the table, which makes its own database (`table.connect()`).
        question: the question in English.
        query: the plan of the gold query.
        sql: the gold query in canonical form.
        rows: what the gold query returns.
        ordered: whether the order of the rows is part of the answer.
    """

    id: str
    kind: Kind
    table: Table
    question: str
    query: Query
    sql: str
    rows: Rows
    ordered: bool

    def case(self) -> Case:
        """What a predicted query is judged against."""
        return Case(self.table.connect, self.rows, self.ordered)


def generate(split: Split, count: int, seed: int = 0) -> list[Example]:
    """Examples of a split, the same ones in every process for the same seed.

    The first examples do not depend on `count`: `generate(split, 10)` begins `generate(split, 100)`.

    Args:
        split: "train", "valid" or "test"; each is about its own tables.
        count: how many; all questions differ.
        seed: another seed asks other questions about the same tables.

    Raises:
        ConfigError: there is no such split, `count` is negative, or more questions are wanted than can be
            found.
    """
    if count < 0:
        raise ConfigError(f"count must be 0 or more, not {count}")
    examples: list[Example] = []
    for example in _stream(split, seed):
        if len(examples) == count:
            break
        examples.append(example)
    if len(examples) < count:
        raise ConfigError(
            f"{count} questions of the {split} split were asked for, but only {len(examples)} different ones "
            f"were found with seed {seed}: ask for fewer, or join several seeds"
        )
    return examples


def _stream(split: Split, seed: int) -> Iterator[Example]:
    """Examples without end, or until new questions become too rare to wait for."""
    dice, choices = Dice("text-to-sql", split, seed), tables(split)
    asked: set[str] = set()
    misses = 0
    while misses < _DRY_SPELL:
        misses += 1
        kind = draw_kind(dice)
        drawn = _draw_meaningful(kind, choices, dice)
        if not drawn:
            continue
        table, query = drawn
        question, query = word(kind, query, table, dice)
        if question.lower() in asked:
            continue
        asked.add(question.lower())
        misses = 0
        rows = run(_database(table), query.sql())
        number = f"{split}-{seed}-{len(asked) - 1:05d}"
        yield Example(number, kind, table, question, query, query.sql(), rows, query.ordered)


def _draw_meaningful(kind: Kind, choices: Sequence[Table], dice: Dice) -> tuple[Table, Query] | None:
    """A table and a plan of the kind that make a good question; kinds that often fail are not given up soon."""
    for _ in range(_TRIES):
        table = dice.choice(choices)
        query = draw_plan(kind, table, dice)
        if _meaningful(query, table):
            return table, query
    return None


@cache
def _database(table: Table) -> Connection:
    return table.connect()


@cache
def _meaningful(query: Query, table: Table) -> bool:
    """Whether the answer is there, is unique, and differs from the answers of all plausible wrong queries."""
    database = _database(table)
    rows = run(database, query.sql())
    if not rows or any(value is None for row in rows for value in row):
        return False
    aggregated = any(term.aggregate for term in query.select)
    if aggregated and not query.group_by and rows[0][0] == 0:
        return False
    if query.order_by and _tied(query, database):
        return False
    if query.order_by and query.limit is None and len(rows) < 2:
        return False
    return not any(
        same_result(rows, run(database, rival.sql()), query.ordered) for rival in rivals(query, table)
    )


def _tied(query: Query, database: Connection) -> bool:
    """Whether two rows of the answer, or the last one and the first left out, have the same sort key."""
    assert query.order_by
    one_more = None if query.limit is None else query.limit + 1
    keys = run(database, replace(query, select=(query.order_by.term,), limit=one_more).sql())
    return len(set(keys)) < len(keys)
