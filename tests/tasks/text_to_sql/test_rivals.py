"""Rivals are different queries with one mistake."""

from __future__ import annotations

from lorakit.tasks.text_to_sql.query import Condition, Order, Query, Term
from lorakit.tasks.text_to_sql.rivals import rivals
from lorakit.tasks.text_to_sql.tables import tables

HOTELS = next(table for table in tables("train") if table.name == "hotels")


def sql(query):
    """The rivals of a query about hotels, as SQL."""
    return {rival.sql() for rival in rivals(query, HOTELS)}


def test_conditions_are_forgotten_turned_round_and_moved_by_one():
    cheap, large = Condition(Term("price"), "<", 90), Condition(Term("city"), "=", "Lisbon")
    assert {
        "SELECT name FROM hotels WHERE city = 'Lisbon'",
        "SELECT name FROM hotels WHERE price < 90",
        "SELECT name FROM hotels WHERE price > 90 AND city = 'Lisbon'",
        "SELECT name FROM hotels WHERE price <= 90 AND city = 'Lisbon'",
    } <= sql(Query("hotels", (Term("name"),), (cheap, large)))


def test_aggregates_and_columns_are_mistaken():
    found = sql(Query("hotels", (Term("price", "MAX"),)))
    assert {
        "SELECT MIN(price) FROM hotels",
        "SELECT AVG(price) FROM hotels",
        "SELECT MAX(rating) FROM hotels",
    } <= found
    assert not any("SUM(rating)" in rival or "MAX(city)" in rival for rival in found)


def test_order_and_limit_are_mistaken():
    query = Query("hotels", (Term("name"),), order_by=Order(Term("price"), descending=True), limit=1)
    assert {
        "SELECT name FROM hotels ORDER BY price ASC LIMIT 1",
        "SELECT name FROM hotels ORDER BY price DESC",
        "SELECT name FROM hotels ORDER BY rating DESC LIMIT 1",
    } <= sql(query)


def test_distinct_is_forgotten():
    assert "SELECT city FROM hotels" in sql(Query("hotels", (Term("city"),), distinct=True))
    assert "SELECT COUNT(city) FROM hotels" in sql(Query("hotels", (Term("city", "COUNT", distinct=True),)))


def test_a_query_is_not_its_own_rival():
    query = Query("hotels", (Term("name"), Term("price")), (Condition(Term("rooms"), ">=", 90),))
    assert query.sql() not in sql(query)
