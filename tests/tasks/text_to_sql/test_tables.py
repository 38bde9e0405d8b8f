"""The tables of the three splits are many, sound, and apart."""

from __future__ import annotations

import itertools
import re

import pytest

from lorakit.errors import ConfigError
from lorakit.tasks.text_to_sql.schema import Key
from lorakit.tasks.text_to_sql.tables import SPLITS, tables

ALL = [table for split in SPLITS for table in tables(split)]


def words(split):
    """Every text value in a split's tables."""
    return {
        str(value) for table in tables(split) for row in table.rows for value in row if isinstance(value, str)
    }


def test_there_are_enough_tables():
    assert len(tables("train")) >= 24
    assert len(tables("valid")) >= 4
    assert len(tables("test")) >= 8


def test_no_table_name_is_used_twice():
    assert len({table.name for table in ALL}) == len(ALL)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SPLITS, 2)))
def test_no_text_value_is_in_two_splits(one, other):
    assert words(one) & words(other) == set()


def test_column_names_overlap_only_in_part():
    train = {column.name for table in tables("train") for column in table.columns}
    test = {column.name for table in tables("test") for column in table.columns}
    assert train & test
    assert len(test - train) >= 10


@pytest.mark.parametrize("table", ALL, ids=lambda table: table.name)
def test_a_table_is_sound(table):
    assert 4 <= len(table.columns) <= 6
    assert 10 <= len(table.rows) <= 14
    assert isinstance(table.key, Key)
    keys = [row[0] for row in table.rows]
    assert len(set(keys)) == len(keys)
    names = [table.name, *(column.name for column in table.columns)]
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in names)
    assert len(set(names[1:])) == len(names) - 1
    connection = table.connect()  # bare names: none may be a word that SQL reserves
    for name in names[1:]:
        connection.execute(
            f"SELECT {name}, COUNT(*) FROM {table.name} WHERE {name} = 1 GROUP BY {name} ORDER BY {name}"
        )
    connection.close()


@pytest.mark.parametrize("table", ALL, ids=lambda table: table.name)
def test_numbers_and_groups_tell_rows_apart(table):
    for column in table.numbers:
        position = table.columns.index(column)
        assert len({row[position] for row in table.rows}) >= 4
    for column in table.categories:
        position = table.columns.index(column)
        assert 3 <= len({row[position] for row in table.rows}) <= 4


def test_an_unknown_split_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'vaild'.*train, valid, test.*'valid'"):
        tables("vaild")
