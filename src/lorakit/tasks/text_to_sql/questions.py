"""Query plans in English: for every construct many sentence shapes, as question, as request and in note form.

Conventions that a reader of the questions should know: asking for rows ("Which cities ...?") means their key
column; asking for columns lists them in the order named; a grouped question returns the group first, then its
value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import figure_wordings, row_wordings
from .asked import Asked
from .dice import Dice
from .phrases import condition_phrases, in_order
from .plans import Kind
from .query import Query
from .schema import Table

_WORDINGS: dict[Kind, Callable[[Asked], list[str]]] = {
    "lookup": row_wordings.lookup,
    "filter": row_wordings.filter,
    "project": row_wordings.project,
    "superlative": row_wordings.superlative,
    "top": row_wordings.top,
    "sort": row_wordings.sort,
    "count": figure_wordings.count,
    "aggregate": figure_wordings.aggregate,
    "distinct": figure_wordings.distinct,
    "group": figure_wordings.group,
    "having": figure_wordings.having,
    "commonest": figure_wordings.commonest,
}


def word(kind: Kind, query: Query, table: Table, dice: Dice) -> tuple[str, Query]:
    """Puts a plan into words.

    Returns:
        The question, and the plan with its conditions in the order in which the question names them.
    """
    options = [
        (condition, dice.choice(condition_phrases(table.column(condition.term.column), condition, dice)))
        for condition in query.where
        if kind != "lookup"
    ]
    pairs = in_order(options)
    if pairs:
        query = replace(query, where=tuple(condition for condition, _ in pairs))
    asked = Asked(query, table, tuple(phrase for _, phrase in pairs), dice)
    text = dice.choice(_WORDINGS[kind](asked))
    return text, query
