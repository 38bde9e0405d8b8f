"""Plans are written as canonical SQL that SQLite reads back as meant."""

from __future__ import annotations

import sqlite3

import pytest

from lorakit.tasks.text_to_sql.query import ROW_COUNT, Condition, Order, Query, Term, literal


@pytest.mark.parametrize("value", ["Paris", "O'Dell", "''", 'say "hi"', "", 12, -3, 2.5])
def test_a_literal_is_read_back_by_sqlite(value):
    with sqlite3.connect(":memory:") as connection:
        assert connection.execute(f"SELECT {literal(value)}").fetchone() == (value,)
    connection.close()


NAME, AGE = Term("name"), Term("age")


@pytest.mark.parametrize(
    ("query", "sql"),
    [
        (Query("dogs", (NAME,)), "SELECT name FROM dogs"),
        (Query("dogs", (NAME, AGE)), "SELECT name, age FROM dogs"),
        (
            Query("dogs", (NAME,), (Condition(AGE, ">", 3), Condition(NAME, "LIKE", "R%"))),
            "SELECT name FROM dogs WHERE age > 3 AND name LIKE 'R%'",
        ),
        (
            Query("dogs", (NAME,), order_by=Order(AGE, descending=True), limit=2),
            "SELECT name FROM dogs ORDER BY age DESC LIMIT 2",
        ),
        (
            Query("dogs", (NAME,), order_by=Order(AGE, descending=False)),
            "SELECT name FROM dogs ORDER BY age ASC",
        ),
        (Query("dogs", (Term("breed"),), distinct=True), "SELECT DISTINCT breed FROM dogs"),
        (Query("dogs", (Term("breed", "COUNT", distinct=True),)), "SELECT COUNT(DISTINCT breed) FROM dogs"),
        (
            Query("dogs", (Term("breed"), Term("age", "AVG")), group_by="breed"),
            "SELECT breed, AVG(age) FROM dogs GROUP BY breed",
        ),
        (
            Query("dogs", (Term("breed"),), group_by="breed", having=Condition(ROW_COUNT, ">=", 2)),
            "SELECT breed FROM dogs GROUP BY breed HAVING COUNT(*) >= 2",
        ),
    ],
)
def test_canonical_sql(query, sql):
    assert query.sql() == sql


def test_only_a_sorted_result_is_ordered():
    assert Query("dogs", (NAME,), order_by=Order(AGE, descending=True)).ordered
    assert not Query("dogs", (NAME,), limit=1).ordered
