"""Running foreign SQL read-only, comparing results, and execution accuracy, also on real databases."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import ConfigError, ExecutionError
from lorakit.tasks.execution import (
    Case,
    execution_accuracy,
    judge,
    open_database,
    run,
    same_result,
)

DATA = Path(os.environ.get("LORAKIT_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "text2sql"

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"


def fruit() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE fruit(name TEXT, price REAL, stock INT)")
    connection.executemany(
        "INSERT INTO fruit VALUES (?, ?, ?)",
        [("apple", 1.5, 10), ("pear", 2.0, 4), ("plum", None, 4)],
    )
    connection.commit()
    return connection


@pytest.fixture
def connection():
    connection = fruit()
    yield connection
    connection.close()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "fruit.sqlite"
    with sqlite3.connect(path) as target:
        fruit().backup(target)
    target.close()
    return path


class TestRun:
    def test_returns_the_rows(self, connection):
        assert run(connection, "SELECT name, stock FROM fruit WHERE stock > 5") == [("apple", 10)]

    @pytest.mark.parametrize(
        "sql",
        [
            "  -- a comment\n/* another */ select name from fruit",
            "WITH f AS (SELECT name FROM fruit) SELECT name FROM f",
            "VALUES (1), (2), (3)",
            "SELECT name FROM fruit;",
        ],
    )
    def test_every_form_of_a_query_is_run(self, connection, sql):
        assert len(run(connection, sql)) == 3

    @pytest.mark.parametrize(
        "sql",
        [
            "DELETE FROM fruit",
            "UPDATE fruit SET stock = 0",
            "INSERT INTO fruit VALUES ('fig', 1, 1)",
            "DROP TABLE fruit",
            "CREATE TABLE other(a)",
            "ATTACH DATABASE ':memory:' AS other",
            "PRAGMA user_version = 3",
            "PRAGMA table_info(fruit)",
            "BEGIN",
            "VACUUM",
            "EXPLAIN SELECT 1",
            "WITH x AS (SELECT 1) DELETE FROM fruit",
            "SELECT name FROM fruit; DROP TABLE fruit",
            "",
            "  -- nothing",
            "The answer is 3.",
        ],
    )
    def test_anything_but_one_query_is_refused_and_changes_nothing(self, connection, sql):
        before = list(connection.iterdump())
        with pytest.raises(ExecutionError):
            run(connection, sql)
        assert list(connection.iterdump()) == before

    def test_a_write_in_disguise_is_called_a_write(self, connection):
        with pytest.raises(ExecutionError, match="may only read"):
            run(connection, "WITH x AS (SELECT 1) DELETE FROM fruit")

    @pytest.mark.parametrize(
        "sql", ["SELECT nothing FROM fruit", "SELECT FROM", "SELECT 'a\0b'", "SELECT '\ud800'"]
    )
    def test_bad_sql_is_an_execution_error_that_quotes_it(self, connection, sql):
        with pytest.raises(ExecutionError, match="SELECT"):
            run(connection, sql)

    def test_dangerous_functions_are_refused(self, connection):
        with pytest.raises(ExecutionError, match="zeroblob"):
            run(connection, "SELECT zeroblob(1000000000)")

    def test_a_slow_query_is_stopped(self, connection):
        start = time.monotonic()
        with pytest.raises(ExecutionError, match=r"more than 0\.2 s"):
            run(connection, ENDLESS, seconds=0.2)
        assert time.monotonic() - start < 5

    def test_the_row_limit_counts_exactly(self, connection):
        assert len(run(connection, "SELECT name FROM fruit", limit=3)) == 3
        with pytest.raises(ExecutionError, match="more than 2 rows"):
            run(connection, "SELECT name FROM fruit", limit=2)

    def test_endless_rows_are_stopped_by_the_limit(self, connection):
        sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
        with pytest.raises(ExecutionError, match="more than 100 rows"):
            run(connection, sql, limit=100, seconds=30)

    @pytest.mark.parametrize("sql", ["SELECT name FROM fruit", "DELETE FROM fruit", "SELECT x"])
    def test_the_connection_is_free_again_afterwards(self, connection, sql):
        with contextlib.suppress(ExecutionError):
            run(connection, sql, seconds=0.05)
        time.sleep(0.06)
        connection.execute("UPDATE fruit SET stock = 1")
        assert connection.execute("SELECT SUM(stock) FROM fruit").fetchone() == (3,)


class TestOpenDatabase:
    def test_reads_a_file(self, file):
        assert run(open_database(file), "SELECT COUNT(*) FROM fruit") == [(3,)]

    def test_the_file_cannot_be_written(self, file):
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            open_database(file).execute("DELETE FROM fruit")

    def test_a_name_with_marks_that_uris_use(self, file):
        odd = file.rename(file.with_name("50% off?#1.sqlite"))
        assert run(open_database(odd), "SELECT COUNT(*) FROM fruit") == [(3,)]

    def test_broken_text_is_replaced(self, file):
        with sqlite3.connect(file) as connection:
            connection.execute("UPDATE fruit SET name = CAST(x'41ff42' AS TEXT) WHERE name = 'pear'")
        connection.close()
        assert run(open_database(file), "SELECT name FROM fruit WHERE price = 2") == [("A\ufffdB",)]

    def test_a_missing_file_is_not_created(self, tmp_path):
        with pytest.raises(ExecutionError, match="no database file"):
            open_database(tmp_path / "none.sqlite")
        assert not list(tmp_path.iterdir())

    def test_a_file_of_another_kind(self, tmp_path):
        path = tmp_path / "text.sqlite"
        path.write_text("this is no database " * 100)
        with pytest.raises(ExecutionError, match="cannot be read as a SQLite database"):
            open_database(path)


class TestSameResult:
    @pytest.mark.parametrize(
        ("left", "right", "same"),
        [
            ([(1,)], [(1.0,)], True),
            ([(0.1 + 0.2,)], [(0.3,)], True),
            ([(1.0,)], [(1.00001,)], False),
            ([(1e12 / 3,)], [(1e12 / 3 * (1 + 1e-15),)], True),
            ([(2**60,)], [(2**60 + 1,)], False),
            ([("3",)], [(3,)], False),
            ([("Peru",)], [("peru",)], False),
            ([(None,)], [(None,)], True),
            ([(None,)], [(0,)], False),
            ([(b"a",)], [("a",)], False),
            ([(1, 2)], [(2, 1)], False),
            ([(1,)], [(1, 1)], False),
            ([], [], True),
            ([], [(1,)], False),
        ],
    )
    @pytest.mark.parametrize("ordered", [True, False])
    def test_values(self, left, right, same, ordered):
        assert same_result(left, right, ordered) is same
        assert same_result(right, left, ordered) is same

    def test_order_counts_only_when_it_was_asked_for(self):
        assert same_result([(1,), (2,)], [(2,), (1,)], ordered=False)
        assert not same_result([(1,), (2,)], [(2,), (1,)], ordered=True)

    def test_repeated_rows_are_counted(self):
        assert not same_result([("a",), ("a",), ("b",)], [("a",), ("b",), ("b",)], ordered=False)

    @given(
        st.lists(
            st.tuples(st.none() | st.integers() | st.text() | st.binary(), st.floats(allow_nan=False)),
            max_size=8,
        ),
        st.randoms(),
    )
    def test_any_rows_equal_themselves_in_any_order(self, rows, random):
        mixed = list(rows)
        random.shuffle(mixed)
        assert same_result(mixed, rows, ordered=False)
        assert not same_result([*mixed, ("one more", 0.0)], rows, ordered=False)


class TestAccuracy:
    gold = Case.from_sql(fruit, "SELECT name FROM fruit WHERE stock = 4", ordered=False)

    def test_another_wording_with_the_same_result_is_right(self):
        assert judge("SELECT name FROM fruit WHERE stock < 5 ORDER BY name DESC", self.gold).correct

    def test_a_wrong_result_is_wrong_without_an_error(self):
        verdict = judge("SELECT name FROM fruit", self.gold)
        assert not verdict.correct
        assert len(verdict.rows) == 3
        assert verdict.error == ""

    def test_a_prediction_that_does_not_run_is_a_verdict(self):
        verdict = judge("SELECT nmae FROM fruit", self.gold)
        assert not verdict.correct
        assert "nmae" in verdict.error

    def test_the_report(self):
        right, wrong, broken = "SELECT name FROM fruit WHERE stock = 4", "SELECT name FROM fruit", "no SQL"
        report = execution_accuracy([right, wrong, broken, right], [self.gold] * 4)
        assert report.accuracy == 0.5
        assert (report.correct, report.failed) == (2, 1)
        assert [verdict.correct for verdict in report.verdicts] == [True, False, False, True]

    def test_limits_reach_the_queries(self):
        assert execution_accuracy([ENDLESS], [self.gold], seconds=0.05).failed == 1
        assert execution_accuracy(["SELECT name FROM fruit"], [self.gold], limit=2).failed == 1

    def test_numbers_must_agree(self):
        with pytest.raises(ConfigError, match="1 predictions for 2 cases"):
            execution_accuracy(["SELECT 1"], [self.gold, self.gold])
        with pytest.raises(ConfigError, match="nothing to judge"):
            execution_accuracy([], [])

    def test_a_gold_query_that_does_not_run_is_an_error(self):
        with pytest.raises(ExecutionError, match="SELECT x"):
            Case.from_sql(fruit, "SELECT x FROM fruit", ordered=False)

    def test_a_database_path(self, file):
        case = Case.from_sql(file, "SELECT MAX(price) FROM fruit", ordered=False)
        assert case.rows == [(2.0,)]
        assert judge("SELECT price FROM fruit WHERE name = 'pear'", case).correct


@pytest.mark.skipif(not DATA.is_dir(), reason="the real text-to-SQL data is not here (set LORAKIT_DATA)")
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_gold_queries_of_geography_give_their_own_rows_and_no_other_query_s(split):
    with gzip.open(DATA / "geography" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        examples = [json.loads(line) for line in lines]
    database = DATA / "db" / "geography.sqlite"
    cases = [Case.from_sql(database, example["sql"], example["ordered"]) for example in examples]
    assert [len(case.rows) for case in cases] == [example["rows"] for example in examples]
    sql = [example["sql"] for example in examples]
    assert execution_accuracy(sql, cases).accuracy == 1
    assert execution_accuracy(sql[1:] + sql[:1], cases).accuracy < 0.35
