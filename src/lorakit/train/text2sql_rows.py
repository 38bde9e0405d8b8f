"""Rows of questions with queries, for databases that lie beside them."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

from lorakit.errors import ConfigError, DataError, ExecutionError, near_matches
from lorakit.tasks import text_to_sql
from lorakit.tasks.execution import Case
from lorakit.train.examples import Example
from lorakit.train.formats import Reading


def text2sql(reading: Reading, learning: bool) -> list[Example]:
    """``{"db_id": ..., "question": ..., "sql": ...}``; judged where the recipe names the databases."""
    data, database = reading.data, reading.text("db_id")
    if data.schemas is None:
        raise ConfigError(
            "text2sql data needs data.schemas, a JSON file from db_id to the CREATE TABLE text."
        )
    schemas = _compact_schemas(data.schemas)
    if database not in schemas:
        raise reading.wrong(
            f"{data.schemas} has no schema for db_id {database!r}.{near_matches(database, schemas)}"
        )
    sql = " ".join(reading.text("sql").split()).removesuffix(";").rstrip()
    prompt = text_to_sql.prompt(schemas[database], reading.text("question"))
    ordered = reading.row.get("ordered", False)
    if not isinstance(ordered, bool):
        raise reading.wrong("'ordered' must be true or false.")
    place, case = str(reading.place), None
    if data.databases is not None:
        case = partial(_case, data.databases / f"{database}.sqlite", sql, ordered, place)
    asked = ({"role": "user", "content": prompt},)
    return [Example(reading.id, asked, sql, (sql,), case=case, place=place)]


def _case(database: Path, sql: str, ordered: bool, where: str) -> Case:
    try:
        return Case.from_sql(database, sql, ordered)
    except ExecutionError as error:
        raise DataError(f"{where}: the gold query does not run: {error}") from error


_SCHEMAS: dict[Path, dict[str, str]] = {}


def _compact_schemas(path: Path) -> dict[str, str]:
    """For each database its tables, a line each: CREATE TABLE text says no more in thrice the tokens."""
    path = path.resolve()
    if path not in _SCHEMAS:
        try:
            texts = json.loads(path.read_text(encoding="utf-8"))
            _SCHEMAS[path] = {name: compact_schema(text) for name, text in texts.items()}
        except (OSError, ValueError, AttributeError, sqlite3.Error) as error:
            raise DataError(f"The schemas {path} cannot be read: {error}.") from error
    return _SCHEMAS[path]


def compact_schema(definition: str) -> str:
    """A database's tables and columns, a table a line, from its CREATE TABLE text."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(definition)
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY rowid"
        ).fetchall()
        lines = []
        for (table,) in tables:
            columns = connection.execute("SELECT name, type FROM pragma_table_info(?)", (table,)).fetchall()
            lines.append(f"{table}({', '.join(f'{name} {kind}'.strip() for name, kind in columns)})")
    return "\n".join(lines)
