"""Running predicted SQL safely on SQLite, and judging it by what it returns.

Two queries that are written differently can both be right, so a prediction counts as correct when its result
equals the gold result (execution accuracy): as a list when the gold query sorts, else as a multiset of rows.
Columns must stand in the right order. Predicted SQL is foreign code: it runs read-only, on one statement,
with a limit on time and rows.
"""

from __future__ import annotations

import math
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import ConfigError, ExecutionError

Row = tuple[object, ...]
Rows = list[Row]

ROW_LIMIT = 10_000
SECONDS = 2.0
TOLERANCE = 1e-6

_LONGEST_VALUE = 10_000_000
_STEPS_BETWEEN_CLOCK_READINGS = 1000
_FORBIDDEN_FUNCTIONS = ("load_extension", "randomblob", "zeroblob", "fts3_tokenizer", "readfile", "writefile")
_QUERY = re.compile(r"(?:\s|--[^\n]*(?:\n|\Z)|/\*.*?\*/)*(?:SELECT|WITH|VALUES)\b", re.IGNORECASE | re.DOTALL)
_READING = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)


def open_database(path: str | Path) -> sqlite3.Connection:
    """Opens a SQLite file for reading only.

    Text that is not valid UTF-8 is decoded with replacement characters.

    Raises:
        ExecutionError: there is no such file, or it is not a SQLite database.
    """
    path = Path(path)
    if not path.is_file():
        raise ExecutionError(f"no database file at {path}")
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    connection.text_factory = lambda data: data.decode(errors="replace")
    try:
        connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        connection.close()
        raise ExecutionError(f"{path} cannot be read as a SQLite database: {error}") from error
    return connection


def run(
    connection: sqlite3.Connection, sql: str, *, limit: int = ROW_LIMIT, seconds: float = SECONDS
) -> Rows:
    """Runs one query and returns its rows, changing nothing.

    Args:
        connection: an open database. Its authorizer and progress handler are replaced, and cleared
            afterwards.
        sql: one SELECT statement (also WITH ... SELECT, and VALUES).
        limit: the most rows that may come back.
        seconds: the longest that it may take.

    Raises:
        ExecutionError: the SQL is wrong, is not a single query, takes too long or returns too many rows.
    """
    if not _QUERY.match(sql):
        raise ExecutionError(f"only SELECT queries are run, and this is none: {_shortened(sql)}")
    refused: list[str] = []

    def authorize(
        action: int, first: str | None, second: str | None, database: str | None, trigger: str | None
    ) -> int:
        forbidden = action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _FORBIDDEN_FUNCTIONS
        if action in _READING and not forbidden:
            return sqlite3.SQLITE_OK
        refused.append(str(second if forbidden else first))
        return sqlite3.SQLITE_DENY

    deadline = time.monotonic() + seconds
    connection.set_authorizer(authorize)
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS_BETWEEN_CLOCK_READINGS)
    longest = _limit_values(connection)
    try:
        with closing(connection.cursor()) as cursor:
            rows = cursor.execute(sql).fetchmany(limit + 1)
    # sqlite3.Warning (two statements, before Python 3.12) is no sqlite3.Error;
    # ValueError: a NUL or a lone surrogate in the text.
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
        if refused:
            raise ExecutionError(
                f"the query may only read, and was refused ({refused[0]}): {_shortened(sql)}"
            ) from error
        if time.monotonic() > deadline:
            raise ExecutionError(
                f"the query took more than {seconds:g} s and was stopped: {_shortened(sql)}"
            ) from error
        raise ExecutionError(f"SQLite cannot run the query ({error}): {_shortened(sql)}") from error
    finally:
        connection.set_progress_handler(None, 0)
        # Before Python 3.11 an authorizer cannot be taken off, only replaced by one that allows everything.
        connection.set_authorizer(lambda *_: sqlite3.SQLITE_OK)
        _restore_values(connection, longest)
    if len(rows) > limit:
        raise ExecutionError(f"the query returns more than {limit} rows: {_shortened(sql)}")
    return rows


def _limit_values(connection: sqlite3.Connection) -> int | None:
    """Keeps a query from building huge strings, where Python can say so (3.11)."""
    if sys.version_info < (3, 11):
        return None
    return connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)


def _restore_values(connection: sqlite3.Connection, longest: int | None) -> None:
    if sys.version_info >= (3, 11) and longest is not None:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, longest)


def _shortened(sql: str) -> str:
    line = " ".join(sql.split())
    return repr(line if len(line) <= 200 else line[:197] + "...")


def same_result(predicted: Sequence[Row], gold: Sequence[Row], ordered: bool) -> bool:
    """Whether two results are equal: as lists if `ordered`, else as multisets of rows.

    Numbers are equal within 1e-6 (absolute, or relative to the larger for large ones), whether integer or
    float; text, blobs and NULL must match exactly, and text never equals a number.
    """
    if len(predicted) != len(gold):
        return False
    if not ordered:
        predicted, gold = sorted(predicted, key=_sort_key), sorted(gold, key=_sort_key)
    return all(
        len(left) == len(right) and all(map(_same_value, left, right))
        for left, right in zip(predicted, gold, strict=True)
    )


def _same_value(left: object, right: object) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-12, abs_tol=TOLERANCE)
    return type(left) is type(right) and left == right


def _sort_key(row: Row) -> list[tuple[int, object]]:
    """Sorts rows of mixed types as SQLite does: NULL, numbers, text, blobs; nearly equal numbers alike."""
    key: list[tuple[int, object]] = []
    for value in row:
        if value is None:
            key.append((0, 0))
        elif isinstance(value, int | float):
            key.append((1, round(value, 6)))
        else:
            key.append((2, value) if isinstance(value, str) else (3, value))
    return key


@dataclass(frozen=True)
class Case:
    """What a prediction is judged against.

    Attributes:
        database: a SQLite file, or a function that opens a database.
        rows: the gold result.
        ordered: whether the order of the rows is part of the answer.
    """

    database: str | Path | Callable[[], sqlite3.Connection]
    rows: Rows
    ordered: bool

    def connect(self) -> sqlite3.Connection:
        """Opens the database; the caller closes it."""
        return self.database() if callable(self.database) else open_database(self.database)

    @classmethod
    def from_sql(
        cls, database: str | Path | Callable[[], sqlite3.Connection], sql: str, ordered: bool
    ) -> Case:
        """A case whose gold result is what a gold query returns.

        Raises:
            ExecutionError: the gold query does not run.
        """
        with closing(cls(database, [], ordered).connect()) as connection:
            return cls(database, run(connection, sql), ordered)


@dataclass(frozen=True)
class Verdict:
    """How one prediction fared: `error` says why it did not run, and is empty when it did."""

    correct: bool
    rows: Rows
    error: str = ""


@dataclass(frozen=True)
class ExecutionReport:
    """The verdicts of a set of predictions, in their order."""

    verdicts: tuple[Verdict, ...]

    @property
    def correct(self) -> int:
        """How many predictions return the gold result."""
        return sum(verdict.correct for verdict in self.verdicts)

    @property
    def failed(self) -> int:
        """How many predictions did not run."""
        return sum(bool(verdict.error) for verdict in self.verdicts)

    @property
    def accuracy(self) -> float:
        """The share of predictions that return the gold result, from 0 to 1."""
        return self.correct / len(self.verdicts)


def judge(prediction: str, case: Case, *, limit: int = ROW_LIMIT, seconds: float = SECONDS) -> Verdict:
    """Runs one predicted query and compares its result with the gold result.

    Raises:
        ExecutionError: the database cannot be opened. A prediction that fails is a verdict, not an exception.
    """
    with closing(case.connect()) as connection:
        try:
            rows = run(connection, prediction, limit=limit, seconds=seconds)
        except ExecutionError as error:
            return Verdict(False, [], str(error))
    return Verdict(same_result(rows, case.rows, case.ordered), rows)


def execution_accuracy(
    predictions: Sequence[str], cases: Sequence[Case], *, limit: int = ROW_LIMIT, seconds: float = SECONDS
) -> ExecutionReport:
    """Judges predicted queries, one for each case.

    Raises:
        ConfigError: the numbers of predictions and cases differ, or there are none.
        ExecutionError: a database cannot be opened.
    """
    if len(predictions) != len(cases):
        raise ConfigError(
            f"{len(predictions)} predictions for {len(cases)} cases: there must be one for each"
        )
    if not cases:
        raise ConfigError("there is nothing to judge: no predictions and no cases")
    return ExecutionReport(
        tuple(
            judge(prediction, case, limit=limit, seconds=seconds)
            for prediction, case in zip(predictions, cases, strict=True)
        )
    )
