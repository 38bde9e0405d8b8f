"""Drawing query plans: which construct, over which columns, with which conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from .dice import Dice
from .query import ROW_COUNT, Condition, Order, Query, Term
from .schema import Category, Column, Key, Measure, Number, Table, Tally, Year

Kind = Literal[
    "lookup",
    "filter",
    "project",
    "count",
    "aggregate",
    "distinct",
    "superlative",
    "top",
    "sort",
    "group",
    "having",
    "commonest",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_WEIGHTS: tuple[tuple[Kind, int], ...] = (
    ("lookup", 13),
    ("filter", 17),
    ("project", 13),
    ("count", 13),
    ("aggregate", 14),
    ("distinct", 4),
    ("superlative", 12),
    ("top", 5),
    ("sort", 3),
    ("group", 3),
    ("having", 1),
    ("commonest", 2),
)


def draw_kind(dice: Dice) -> Kind:
    """A construct, the common ones more often."""
    return dice.weighted(_WEIGHTS)


def draw_plan(kind: Kind, table: Table, dice: Dice) -> Query:
    """A query plan of a kind. It is well formed; whether its answer says anything is for the caller to check."""
    return _DRAW[kind](table, dice)


def functions(column: Column) -> tuple[str, ...]:
    """The aggregate functions that make sense for a column."""
    if isinstance(column, Key | Category):
        return ()
    if isinstance(column, Year):
        return ("MIN", "MAX")
    if isinstance(column, Tally) or column.additive:
        return ("AVG", "SUM", "MIN", "MAX")
    return ("AVG", "MIN", "MAX")


def _terms(columns: Sequence[Column]) -> tuple[Term, ...]:
    return tuple(Term(column.name) for column in columns)


def _key_term(table: Table) -> Term:
    return Term(table.key.name)


def _condition(column: Column, table: Table, dice: Dice) -> Condition:
    """A condition on a column, with a value that one of the rows has, so that `>` and `>=` differ."""
    position = table.columns.index(column)
    value = dice.choice([row[position] for row in table.rows])
    if isinstance(column, Key):
        return Condition(Term(column.name), "LIKE", _pattern(str(value), dice))
    if isinstance(column, Category):
        return Condition(Term(column.name), "=", value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    exact = 1 if isinstance(column, Measure) else 4
    operators = ((">", 6), ("<", 6), (">=", 3), ("<=", 3), ("=", exact))
    return Condition(Term(column.name), dice.weighted(operators), value)


def _pattern(value: str, dice: Dice) -> str:
    """A LIKE pattern that matches a value: how it starts, ends, or a piece from the middle."""
    place = dice.weighted((("start", 3), ("middle", 2), ("end", 1)))
    letters = "".join(letter if letter.isalpha() else " " for letter in value)
    if place == "start":
        return f"{letters.split()[0][0]}%" if letters[0].isalpha() else "%%"
    if place == "end":
        return f"%{letters[-1]}" if letters[-1].isalpha() else "%%"
    word = dice.choice([word for word in letters.split() if len(word) >= 3] or [letters.split()[0]])
    start = dice.below(max(1, len(word) - 2))
    return f"%{word[start : start + 3].lower()}%"


def _conditions(
    table: Table, dice: Dice, weights: Sequence[tuple[int, int]], avoid: Sequence[Column] = ()
) -> tuple[Condition, ...]:
    """Conditions on different columns; `weights` says how likely each number of conditions is."""
    count = dice.weighted(weights)
    columns: list[Column] = [column for column in table.columns[1:] if column not in avoid]
    return tuple(_condition(column, table, dice) for column in dice.sample(columns, count))


def _lookup(table: Table, dice: Dice) -> Query:
    columns = dice.sample(table.columns[1:], dice.weighted(((1, 3), (2, 1))))
    name = dice.choice([row[0] for row in table.rows])
    return Query(table.name, _terms(columns), (Condition(_key_term(table), "=", name),))


def _filter(table: Table, dice: Dice) -> Query:
    if dice.chance(0.15):
        return Query(table.name, (_key_term(table),), (_condition(table.key, table, dice),))
    return Query(table.name, (_key_term(table),), _conditions(table, dice, ((1, 3), (2, 2))))


def _project(table: Table, dice: Dice) -> Query:
    columns: list[Column] = list(dice.sample(table.columns[1:], dice.weighted(((1, 3), (2, 1)))))
    if len(columns) == 1 and dice.chance(0.6):
        columns.insert(0, table.key)
    return Query(
        table.name, _terms(columns), _conditions(table, dice, ((0, 1), (1, 5), (2, 2)), avoid=columns)
    )


def _count(table: Table, dice: Dice) -> Query:
    if dice.chance(0.1):
        where: tuple[Condition, ...] = (_condition(table.key, table, dice),)
    else:
        where = _conditions(table, dice, ((0, 1), (1, 8), (2, 4)))
    return Query(table.name, (ROW_COUNT,), where)


def _aggregate(table: Table, dice: Dice) -> Query:
    column = dice.choice(table.numbers)
    function = dice.choice(functions(column))
    return Query(
        table.name,
        (Term(column.name, function),),
        _conditions(table, dice, ((0, 2), (1, 5), (2, 2)), avoid=[column]),
    )


def _distinct(table: Table, dice: Dice) -> Query:
    column = dice.choice(table.categories)
    where = _conditions(table, dice, ((0, 1), (1, 2)), avoid=[column])
    if dice.chance(0.5):
        return Query(table.name, (Term(column.name, "COUNT", distinct=True),), where)
    return Query(table.name, (Term(column.name),), where, distinct=True)


def _superlative(table: Table, dice: Dice) -> Query:
    column = dice.choice(table.numbers)
    order = Order(Term(column.name), dice.chance(0.6))
    others = [other for other in table.columns[1:] if other is not column]
    shape = dice.weighted((("key", 5), ("other", 2), ("both", 1)))
    chosen: list[Column] = [table.key] if shape != "other" else []
    chosen += [dice.choice(others)] if shape != "key" else []
    where = _conditions(table, dice, ((0, 1), (1, 2)), avoid=[column, *chosen])
    return Query(table.name, _terms(chosen), where, order_by=order, limit=1)


def _top(table: Table, dice: Dice) -> Query:
    column = dice.choice(table.numbers)
    order = Order(Term(column.name), dice.chance(0.6))
    where = _conditions(table, dice, ((0, 2), (1, 1)), avoid=[column])
    chosen: list[Column] = [table.key, column] if dice.chance(0.2) else [table.key]
    return Query(table.name, _terms(chosen), where, order_by=order, limit=2 + dice.below(4))


def _sort(table: Table, dice: Dice) -> Query:
    column: Number | Key = table.key if dice.chance(0.25) else dice.choice(table.numbers)
    order = Order(Term(column.name), column is not table.key and dice.chance(0.5))
    chosen: list[Column] = (
        [table.key, column] if column is not table.key and dice.chance(0.3) else [table.key]
    )
    return Query(
        table.name, _terms(chosen), _conditions(table, dice, ((0, 2), (1, 3)), avoid=[column]), order_by=order
    )


def _group(table: Table, dice: Dice) -> Query:
    category = dice.choice(table.categories)
    value = ROW_COUNT
    if dice.chance(0.55):
        column = dice.choice(table.numbers)
        value = Term(column.name, dice.choice(functions(column)))
    return Query(table.name, (Term(category.name), value), group_by=category.name)


def _having(table: Table, dice: Dice) -> Query:
    category = dice.choice(table.categories)
    having = Condition(ROW_COUNT, dice.choice((">", ">=", "<", "=")), 2 + dice.below(4))
    return Query(table.name, (Term(category.name),), group_by=category.name, having=having)


def _commonest(table: Table, dice: Dice) -> Query:
    category = dice.choice(table.categories)
    where = _conditions(table, dice, ((0, 2), (1, 1)), avoid=[category])
    order = Order(ROW_COUNT, dice.chance(0.75))
    return Query(table.name, (Term(category.name),), where, group_by=category.name, order_by=order, limit=1)


_DRAW: dict[Kind, Callable[[Table, Dice], Query]] = {
    "lookup": _lookup,
    "filter": _filter,
    "project": _project,
    "count": _count,
    "aggregate": _aggregate,
    "distinct": _distinct,
    "superlative": _superlative,
    "top": _top,
    "sort": _sort,
    "group": _group,
    "having": _having,
    "commonest": _commonest,
}
