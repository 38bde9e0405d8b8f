"""Plausible wrong readings of a query, which a good question must tell apart from the right one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .plans import functions
from .query import Query
from .schema import Category, Key, Table

_FLIPPED = {">": "<", "<": ">", ">=": "<=", "<=": ">="}
_NEIGHBOR = {">": ">=", "<": "<=", ">=": ">", "<=": "<", "=": ">="}


def rivals(query: Query, table: Table) -> Iterator[Query]:
    """The query with one mistake each.

    A forgotten or an inverted condition, `>` for `>=`, the wrong column, the wrong aggregate, the wrong
    direction or end of the list, a forgotten DISTINCT or HAVING.
    """
    yield from _wrong_conditions(query, table)
    yield from _wrong_selection(query, table)
    if query.having:
        yield replace(query, having=None)
        for operator in (_FLIPPED.get(query.having.operator), _NEIGHBOR[query.having.operator]):
            if operator:
                yield replace(query, having=replace(query.having, operator=operator))
    if query.distinct:
        yield replace(query, distinct=False)
    if query.order_by:
        yield replace(query, order_by=replace(query.order_by, descending=not query.order_by.descending))
        if query.limit:
            yield replace(query, limit=None)
        name = query.order_by.term.column
        for other in table.columns:
            if (
                query.order_by.term.column != "*"
                and other.name != name
                and not isinstance(other, Category | Key)
            ):
                yield replace(
                    query,
                    order_by=replace(query.order_by, term=replace(query.order_by.term, column=other.name)),
                )


def _wrong_conditions(query: Query, table: Table) -> Iterator[Query]:
    for index, condition in enumerate(query.where):
        before, after = query.where[:index], query.where[index + 1 :]
        yield replace(query, where=before + after)
        numeric = not isinstance(table.column(condition.term.column), Key | Category)
        operators = (_FLIPPED.get(condition.operator), _NEIGHBOR.get(condition.operator)) if numeric else ()
        for operator in operators:
            if operator:
                yield replace(query, where=(*before, replace(condition, operator=operator), *after))


def _wrong_selection(query: Query, table: Table) -> Iterator[Query]:
    for index, term in enumerate(query.select):
        before, after = query.select[:index], query.select[index + 1 :]
        column = None if term.column == "*" else table.column(term.column)
        if term.aggregate and not term.distinct and column is not None:
            for function in functions(column):
                if function != term.aggregate:
                    yield replace(query, select=(*before, replace(term, aggregate=function), *after))
        if term.distinct:
            yield replace(query, select=(*before, replace(term, distinct=False), *after))
        for other in table.columns:
            if column is None or other is column:
                continue
            if not term.aggregate or term.distinct or term.aggregate in functions(other):
                yield replace(query, select=(*before, replace(term, column=other.name), *after))
