"""From a recipe's data section to examples: the built-in task, and JSON lines files in four formats."""

from __future__ import annotations

import gzip
import json
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import ConfigError, DataError, ExecutionError, near_matches
from lorakit.tasks import text_to_sql
from lorakit.tasks.execution import Case
from lorakit.train.data_sections import BuiltinData, DataSection, FileData, LabelledData
from lorakit.train.examples import Example, Message

Split = Literal["train", "valid", "test"]

_FORMATS: dict[str, tuple[str, ...]] = {  # the keys by which a row is known, the most telling first
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text2sql": ("question", "sql", "db_id"),
    "generate": ("instruction", "references"),
}
_ROLES = ("system", "user", "assistant")


def load_examples(data: DataSection, split: Split, *, learning: bool = False) -> list[Example]:
    """The examples of a split.

    Args:
        data: The recipe's section.
        split: Which part.
        learning: Whether they are to be learnt: then a row with several references gives an example for each (see
            ``data.references``); to score, it is one example.

    Raises:
        DataError: A file is missing, empty or malformed; the message names the line.
        ConfigError: The recipe names no such split.
    """
    if isinstance(data, BuiltinData):
        return _builtin(data, split)
    assert isinstance(data, FileData)
    path = file_of(data, split)
    examples = [e for row in _rows(path, data, data.max_rows.get(split)) for e in row(learning)]
    return examples if data.system is None else [_with_system(e, data.system) for e in examples]


def file_of(data: FileData | LabelledData, split: Split) -> Path:
    """The file of a split.

    Raises:
        ConfigError: The recipe names none.
    """
    path: Path | None = getattr(data, split)
    if path is None:
        raise ConfigError(f"The recipe names no file for the {split} split: set data.{split}.")
    return path


def has_split(data: DataSection, split: Split) -> bool:
    """Whether the recipe names examples for a split."""
    return bool(getattr(data, split))


def _builtin(data: BuiltinData, split: Split) -> list[Example]:
    count = getattr(data, split)
    if not count:
        raise ConfigError(
            f"The recipe asks for no examples of the {split} split: set data.{split} to a number."
        )
    return [
        Example(
            e.id, tuple(text_to_sql.messages(e)), text_to_sql.answer(e), (text_to_sql.answer(e),), case=e.case
        )
        for e in text_to_sql.generate(split, count, data.seed)
    ]


# ---- files
Row = Callable[[bool], list[Example]]


def read_json_lines(path: Path, most: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line that is not blank.

    Raises:
        DataError: The file is missing, empty, cut off, or a line is no JSON object.
    """
    check_file(path)
    count = number = 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if count == most:
                    return
                count += 1
                yield number, _object(line, path, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}, after line {number}: the gzip file is damaged or cut off ({error})."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, near line {number + 1}: not UTF-8 text ({error.reason}).") from error
    if not count:
        raise DataError(f"{path} is empty: expected JSON lines, one object a line.")


def check_file(path: Path) -> None:
    """Raise `DataError` when there is no such file, with the names beside it that are like its own."""
    if not path.is_file():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        raise DataError(f"There is no data file {path}.{near_matches(path.name, (p.name for p in beside))}")


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{path}, line {number}: not valid JSON ({error}). Expected one object a line."
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{path}, line {number}: expected an object with named values, found {type(row).__name__}."
        )
    return row


def _rows(path: Path, data: FileData, most: int | None) -> Iterator[Row]:
    kind: str | None = None if data.format == "auto" else data.format
    for number, row in read_json_lines(path, most):
        kind = kind or _detect(row, path, number)
        yield partial(_READERS[kind], _Reading(path, number, row, data))


def _detect(row: Mapping[str, Any], path: Path, number: int) -> str:
    for kind, keys in _FORMATS.items():
        if all(key in row for key in keys):
            return kind
    known = "; ".join(f"{kind} ({', '.join(keys)})" for kind, keys in _FORMATS.items())
    raise DataError(
        f"{path}, line {number}: the keys {sorted(row)} tell no known format. The formats and their keys: {known}. "
        "Name one in data.format."
    )


class _Reading:
    """One row with its place, for messages."""

    def __init__(self, path: Path, number: int, row: Mapping[str, Any], data: FileData) -> None:
        self.path, self.number, self.row, self.data = path, number, row, data

    @property
    def id(self) -> str:
        return str(self.row.get("id", f"{self.path.name}:{self.number}"))

    def wrong(self, what: str) -> DataError:
        return DataError(f"{self.path}, line {self.number}: {what}")

    def text(self, key: str, *, may_be_empty: bool = False) -> str:
        if key not in self.row:
            raise self.wrong(
                f"{key!r} is missing.{near_matches(key, self.row)} The row has: {sorted(self.row)}."
            )
        value = self.row[key]
        if not isinstance(value, str):
            raise self.wrong(f"{key!r} must be text, not {type(value).__name__}.")
        if not value.strip() and not may_be_empty:
            raise self.wrong(f"{key!r} is empty.")
        return value


def _generate(reading: _Reading, learning: bool) -> list[Example]:
    references = reading.row.get("references")
    if not isinstance(references, list) or not references:
        raise reading.wrong("'references' must be a list of one or more texts.")
    if not all(isinstance(r, str) and r.strip() for r in references):
        raise reading.wrong("'references' holds something that is empty or no text.")
    given = reading.text("input", may_be_empty=True) if "input" in reading.row else ""
    prompt = "\n".join(part for part in (reading.text("instruction").strip(), given.strip()) if part)
    messages: tuple[Message, ...] = ({"role": "user", "content": prompt},)
    every = tuple(r.strip() for r in references)
    answers = every if learning and reading.data.references == "all" else every[:1]
    return [
        Example(reading.id if len(answers) == 1 else f"{reading.id}#{i}", messages, answer, every)
        for i, answer in enumerate(answers)
    ]


def _prompt_completion(reading: _Reading, learning: bool) -> list[Example]:
    answer = reading.text("completion").strip()
    return [Example(reading.id, ({"role": "user", "content": reading.text("prompt")},), answer, (answer,))]


def _messages(reading: _Reading, learning: bool) -> list[Example]:
    turns = reading.row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise reading.wrong("'messages' must be a list of turns.")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise reading.wrong(
                "each of the 'messages' must be an object with a 'role' and a text 'content'."
            )
        if turn.get("role") not in _ROLES:
            raise reading.wrong(f"the role {turn.get('role')!r} is none of {', '.join(_ROLES)}.")
    if turns[-1]["role"] != "assistant":
        raise reading.wrong("the last of the 'messages' must be the assistant's answer.")
    if len(turns) == 1 or turns[-2]["role"] == "assistant":
        raise reading.wrong("the assistant's answer must follow another's turn.")
    clean = [{"role": turn["role"], "content": turn["content"].strip()} for turn in turns]
    if not all(turn["content"] for turn in clean if turn["role"] == "assistant"):
        raise reading.wrong("an answer of the assistant is empty.")
    answer = clean[-1]["content"]
    return [Example(reading.id, tuple(clean[:-1]), answer, (answer,), learn_all=reading.data.learn == "all")]


def _text2sql(reading: _Reading, learning: bool) -> list[Example]:
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
    case = None
    if data.databases is not None:
        case = partial(
            _case,
            data.databases / f"{database}.sqlite",
            sql,
            ordered,
            f"{reading.path}, line {reading.number}",
        )
    return [Example(reading.id, ({"role": "user", "content": prompt},), sql, (sql,), case=case)]


_READERS: dict[str, Callable[[_Reading, bool], list[Example]]] = {
    "generate": _generate,
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "text2sql": _text2sql,
}


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


def _with_system(example: Example, system: str) -> Example:
    from dataclasses import replace

    if example.messages[0]["role"] == "system":
        return example
    return replace(example, messages=({"role": "system", "content": system}, *example.messages))
