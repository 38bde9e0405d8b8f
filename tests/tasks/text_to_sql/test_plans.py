"""Drawn plans are well formed and of their kind."""

from __future__ import annotations

from collections import Counter

import pytest

from lorakit.tasks.execution import run
from lorakit.tasks.text_to_sql.dice import Dice
from lorakit.tasks.text_to_sql.plans import KINDS, draw_kind, draw_plan, functions
from lorakit.tasks.text_to_sql.schema import Category, Key, Year
from lorakit.tasks.text_to_sql.tables import tables

TABLES = tables("train") + tables("valid") + tables("test")

MARKS = {
    "lookup": " = '",
    "count": "COUNT(*)",
    "distinct": "DISTINCT",
    "superlative": "LIMIT 1",
    "top": "LIMIT",
    "sort": "ORDER BY",
    "group": "GROUP BY",
    "having": "HAVING COUNT(*)",
    "commonest": "ORDER BY COUNT(*)",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_plan_runs_on_every_table_and_shows_its_kind(kind):
    for table in TABLES:
        connection = table.connect()
        for seed in range(6):
            sql = draw_plan(kind, table, Dice(table.name, seed)).sql()
            run(connection, sql)
            assert MARKS.get(kind, "SELECT") in sql
        connection.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_condition_never_repeats_a_column_or_asks_for_what_it_fixes(kind):
    for seed in range(200):
        query = draw_plan(kind, TABLES[seed % len(TABLES)], Dice(seed))
        fixed = [condition.term.column for condition in query.where]
        assert len(set(fixed)) == len(fixed)
        if kind in ("project", "lookup", "aggregate"):
            assert not {term.column for term in query.select} & set(fixed)


def test_aggregates_make_sense():
    for table in TABLES:
        for column in table.columns:
            if isinstance(column, Key | Category):
                assert functions(column) == ()
            elif isinstance(column, Year):
                assert functions(column) == ("MIN", "MAX")
            else:
                assert {"AVG", "MIN", "MAX"} <= set(functions(column))


def test_every_kind_is_drawn():
    dice = Dice("kinds")
    assert set(Counter(draw_kind(dice) for _ in range(2000))) == set(KINDS)
