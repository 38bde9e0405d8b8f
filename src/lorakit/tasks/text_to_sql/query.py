"""Query plans over one table, and the one canonical way to write each as SQL.

A plan is what the question generator and the SQL writer share: the questions are worded from it, the gold SQL
is rendered from it, and `rivals` changes it a little to make the plausible mistakes that a good question must
tell apart from the right answer.
"""

from __future__ import annotations

from dataclasses import dataclass

Value = str | int | float

AGGREGATES = ("COUNT", "SUM", "AVG", "MIN", "MAX")
OPERATORS = ("=", ">", "<", ">=", "<=", "LIKE")


def literal(value: Value) -> str:
    """A value as an SQL literal: text in single quotes, with quotes inside doubled."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value)


@dataclass(frozen=True)
class Term:
    """A column or an aggregate of one: `price`, `AVG(price)`, `COUNT(DISTINCT country)`, `COUNT(*)`."""

    column: str
    aggregate: str = ""
    distinct: bool = False

    def sql(self) -> str:
        if not self.aggregate:
            return self.column
        return f"{self.aggregate}({'DISTINCT ' if self.distinct else ''}{self.column})"


ROW_COUNT = Term("*", "COUNT")


@dataclass(frozen=True)
class Condition:
    """A comparison of a term with a constant: `population > 5000`, `name LIKE 'S%'`, `COUNT(*) >= 2`."""

    term: Term
    operator: str
    value: Value

    def sql(self) -> str:
        return f"{self.term.sql()} {self.operator} {literal(self.value)}"


@dataclass(frozen=True)
class Order:
    """The sort key of a query. The direction is always written out: `ORDER BY population DESC`."""

    term: Term
    descending: bool

    def sql(self) -> str:
        return f"{self.term.sql()} {'DESC' if self.descending else 'ASC'}"


@dataclass(frozen=True)
class Query:
    """A SELECT over one table."""

    table: str
    select: tuple[Term, ...]
    where: tuple[Condition, ...] = ()
    distinct: bool = False
    group_by: str = ""
    having: Condition | None = None
    order_by: Order | None = None
    limit: int | None = None

    @property
    def ordered(self) -> bool:
        """Whether the order of the result's rows is part of the answer."""
        return self.order_by is not None

    def sql(self) -> str:
        """The query on one line: upper-case keywords, single spaces, bare names, no closing semicolon."""
        parts = ["SELECT"]
        if self.distinct:
            parts.append("DISTINCT")
        parts += [", ".join(term.sql() for term in self.select), "FROM", self.table]
        if self.where:
            parts += ["WHERE", " AND ".join(condition.sql() for condition in self.where)]
        if self.group_by:
            parts += ["GROUP BY", self.group_by]
        if self.having:
            parts += ["HAVING", self.having.sql()]
        if self.order_by:
            parts += ["ORDER BY", self.order_by.sql()]
        if self.limit is not None:
            parts += ["LIMIT", str(self.limit)]
        return " ".join(parts)
