"""Columns draw their values, tables build their databases."""

from __future__ import annotations

import pytest

from lorakit.tasks.text_to_sql.dice import Dice
from lorakit.tasks.text_to_sql.schema import Category, Grid, Key, Measure, Table, Tally

PETS = Table(
    "pets",
    "pet",
    "pets",
    (
        Key("name", "Ann, Bo, O'Cat, Dot"),
        Category("kind", "kind", "kinds", "cat, dog"),
        Measure("weight", ("weight",), Grid(0.5, 9.5, 0.5)),
        Tally("toys", "toys", Grid(1, 9)),
    ),
)


@pytest.mark.parametrize(
    ("grid", "type_name", "values"),
    [
        (Grid(1, 5), "INT", [1, 2, 3, 4, 5]),
        (Grid(10, 30, 10), "INT", [10, 20, 30]),
        (Grid(0.1, 0.5, 0.1), "REAL", [0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
)
def test_a_grid(grid, type_name, values):
    assert grid.type == type_name
    assert grid.values() == values
    assert all(isinstance(value, int if type_name == "INT" else float) for value in grid.values())


def test_a_wide_grid_gives_different_numbers_a_narrow_one_may_repeat():
    assert len(set(Grid(1, 100).draw(12, Dice("wide")))) == 12
    assert len(set(Grid(1, 3).draw(12, Dice("narrow")))) <= 3


def test_a_category_uses_every_value():
    column = Category("kind", "kind", "kinds", "a, b, c, d")
    for seed in range(20):
        assert set(column.draw(10, Dice(seed))) == set("abcd")


def test_the_schema_line():
    assert PETS.schema() == "pets(name TEXT, kind TEXT, weight REAL, toys INT)"


def test_the_database_holds_the_rows_with_their_types():
    connection = PETS.connect()
    assert tuple(connection.execute("SELECT * FROM pets")) == PETS.rows
    assert {"O'Cat"} < {row[0] for row in PETS.rows}
    types = connection.execute(
        "SELECT typeof(name), typeof(kind), typeof(weight), typeof(toys) FROM pets LIMIT 1"
    )
    assert types.fetchone() == ("text", "text", "real", "integer")
    connection.close()


def test_connections_do_not_share_a_database():
    first, second = PETS.connect(), PETS.connect()
    first.execute("DELETE FROM pets")
    assert second.execute("SELECT COUNT(*) FROM pets").fetchone() == (4,)
    first.close()
    second.close()


def test_views_of_the_columns():
    assert PETS.key.name == "name"
    assert [column.name for column in PETS.categories] == ["kind"]
    assert [column.name for column in PETS.numbers] == ["weight", "toys"]
    assert PETS.column("toys") is PETS.columns[3]
