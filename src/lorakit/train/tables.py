"""Rows of one file with the place of each: JSON lines, a JSON list, CSV, TSV, text or Parquet; plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import ConfigError, DataError, MissingDependencyError, near_matches
from lorakit.train.data_sections import TableFormat, TextRows

ENDINGS: dict[str, TableFormat] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv",
    ".parquet": "parquet",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a row stands.

    Attributes:
        source: The file, or what else is read.
        unit: What is counted: ``"line"`` or ``"row"``.
        number: From 1.
    """

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"

    @property
    def short(self) -> str:
        """For people who know the folder: ``"train.jsonl:7"``."""
        return f"{Path(self.source).name}:{self.number}"


Row = tuple[Place, dict[str, Any]]


def file_rows(
    path: Path,
    kind: TableFormat = "auto",
    most: int | None = None,
    *,
    texts: TextRows = "paragraph",
    setting: str = "data.format",
) -> Iterator[Row]:
    """The rows of a file, each with its place.

    Args:
        path: The file; a name that ends in ``.gz`` is a gzipped one.
        kind: What it holds; ``auto`` tells by its ending.
        most: Read only so many rows.
        texts: What a row of a plain text file is; each has the one key ``text``.
        setting: The key of the recipe that names the kind, for messages.

    Raises:
        DataError: The file is missing, empty, cut off or malformed.
        ConfigError: Its ending tells nothing.
        MissingDependencyError: Parquet needs pyarrow.
    """
    check_file(path)
    kind = _kind(path, setting) if kind == "auto" else kind
    readers = {
        "jsonl": lambda: _lines(path),
        "json": lambda: _list(path),
        "csv": lambda: _separated(path, ","),
        "tsv": lambda: _separated(path, "\t"),
        "txt": lambda: _texts(path, texts),
        "parquet": lambda: _parquet(path),
    }
    return islice(readers[kind](), most)


def check_file(path: Path) -> None:
    """Raise `DataError` when there is no such file, with the names beside it that are like its own."""
    if not path.is_file():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        raise DataError(f"There is no data file {path}.{near_matches(path.name, (p.name for p in beside))}")


def ending_of(path: Path) -> str:
    """The ending that tells what a file holds, ``.gz`` left out."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _kind(path: Path, setting: str) -> TableFormat:
    ending = ending_of(path)
    if ending not in ENDINGS:
        raise ConfigError(
            f"The ending of {path.name} does not tell what the file holds: set {setting} to jsonl, json, csv, tsv or "
            "parquet."
        )
    return ENDINGS[ending]


# ---- JSON
def _lines(path: Path) -> Iterator[Row]:
    found, number = False, 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found = True
                    yield Place(str(path), "line", number), _object(line, path, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}, after line {number}: the gzip file is damaged or cut off ({error})."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, near line {number + 1}: not UTF-8 text ({error.reason}).") from error
    if not found:
        raise DataError(f"{path} is empty: expected JSON lines, one object a line.")


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


def _list(path: Path) -> Iterator[Row]:
    text = _text(path)
    try:
        rows = json.loads(text)
    except ValueError as error:
        if _starts_with_an_object(text):  # JSON lines under the name of JSON, as many data sets have them
            yield from _lines(path)
            return
        raise DataError(f"{path}: not valid JSON ({error}). Expected a list of objects.") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: expected a list of one or more objects, found {_what(rows)}.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {number}: expected an object with named values, found {_what(row)}."
            )
        yield Place(str(path), "row", number), row


def _starts_with_an_object(text: str) -> bool:
    first = text.lstrip().split("\n", 1)[0]
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _what(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__


# ---- text
def _text(path: Path) -> str:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut off ({error}).") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason}).") from error


def _texts(path: Path, texts: TextRows) -> Iterator[Row]:
    whole = _text(path).replace("\r\n", "\n")
    pattern = {"line": r"[^\n]+", "paragraph": r"\S[^\n]*(?:\n[^\n]*\S[^\n]*)*", "file": r"(?s:\S.*)"}[texts]
    found, line, seen = False, 1, 0
    for match in re.finditer(pattern, whole):
        if not match[0].strip():
            continue
        found = True
        line += whole.count("\n", seen, match.start())
        seen = match.start()
        yield Place(str(path), "line", line), {"text": match[0].strip()}
    if not found:
        raise DataError(f"{path} is empty: expected text.")


_LONGEST_CELL = 2**31 - 1  # Python allows 128 kB, which a document may exceed


def _separated(path: Path, separator: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    # A tab-separated file has no quotes by habit: those in it are part of the text.
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    text = io.StringIO(_text(path), newline="")
    lines = csv.reader(text, delimiter=separator, quoting=quoting, strict=True)
    names: list[str] | None = None
    found = False
    try:
        for cells in lines:
            place = Place(str(path), "line", lines.line_num)
            if not any(cell.strip() for cell in cells):
                continue
            if names is None:
                names = [cell.strip() for cell in cells]
                if len(set(names)) < len(names):
                    raise DataError(f"{place}: two columns have the same name: {names}.")
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{place}: {len(cells)} values for {len(names)} columns ({', '.join(names)})."
                )
            found = True
            yield place, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num}: {error}.") from error
    if not found:
        raise DataError(
            f"{path} has no rows: expected a line with the names of the columns, then a row a line."
        )


# ---- Parquet
def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"Reading {path.name} needs pyarrow. Install it with: pip install 'lorakit[data]'"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(str(path), "row", number), row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}, after row {number}: the Parquet file is damaged or cut off ({error})."
        ) from error
    if not number:
        raise DataError(f"{path} is empty: it has no rows.")
