"""Rows of a table with the place of each, for messages: JSON lines, a JSON list, CSV or TSV; plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import ConfigError, DataError
from lorakit.train.data import check_file, read_json_lines
from lorakit.train.data_sections import TableFormat

_ENDINGS: dict[str, TableFormat] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv",
}  # fmt: skip


def read_table(
    path: Path, kind: TableFormat = "auto", most: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place (``"train.csv, line 7"``).

    Args:
        path: The file; a name that ends in ``.gz`` is a gzipped one.
        kind: What it holds; ``auto`` tells by its ending.
        most: Read only so many rows.

    Raises:
        DataError: The file is missing, empty, cut off or malformed.
        ConfigError: Its ending tells nothing.
    """
    check_file(path)
    kind = _kind(path) if kind == "auto" else kind
    if kind == "jsonl":
        return ((f"{path}, line {number}", row) for number, row in read_json_lines(path, most))
    rows = _list(path) if kind == "json" else _separated(path, "," if kind == "csv" else "\t")
    return islice(rows, most)


def _kind(path: Path) -> TableFormat:
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    if ending not in _ENDINGS:
        raise ConfigError(
            f"The ending of {path.name} does not tell what the file holds: set data.format to jsonl, json, csv or tsv."
        )
    return _ENDINGS[ending]


def _text(path: Path) -> str:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut off ({error}).") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason}).") from error


def _list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}). Expected a list of objects.") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: expected a list of one or more objects, found {_what(rows)}.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {number}: expected an object with named values, found {_what(row)}."
            )
        yield f"{path}, row {number}", row


def _separated(path: Path, separator: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # A tab-separated file has no quotes by habit: those in it are part of the text.
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    lines = csv.reader(
        io.StringIO(_text(path), newline=""), delimiter=separator, quoting=quoting, strict=True
    )
    names: list[str] | None = None
    found = False
    try:
        for cells in lines:
            place = f"{path}, line {lines.line_num}"
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


def _what(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__
