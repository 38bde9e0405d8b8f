"""What the rows of a file hold, told by their keys; and one row with its place, so that mistakes can be named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lorakit.errors import DataError, near_matches
from lorakit.models.conversation import Message, Tool, normalised
from lorakit.train.data_sections import FileData
from lorakit.train.sources import source_rows
from lorakit.train.split import Split, source_of
from lorakit.train.tables import Place

FORMATS: dict[str, tuple[str, ...]] = {  # the keys by which a row is known, the most telling first
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "text2sql": ("question", "sql", "db_id"),
    "generate": ("instruction", "references"),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "seq2seq": ("source", "target"),
    "text": ("text",),
}


class Reading:
    """One row with its place.

    Attributes:
        format: What it holds.
        place: Where it stands.
        row: Its values, under the names of the format.
        data: The recipe's section.
    """

    def __init__(self, format: str, place: Place, row: Mapping[str, Any], data: FileData) -> None:
        self.format, self.place, self.row, self.data = format, place, row, data

    @property
    def id(self) -> str:
        """The row's own name, else its place in short."""
        own = self.row.get("id")
        return self.place.short if own is None else str(own)

    def wrong(self, what: str) -> DataError:
        """The error to raise about this row."""
        return DataError(f"{self.place}: {what}")

    def value(self, key: str) -> Any:
        """What stands under a key.

        Raises:
            DataError: Nothing does.
        """
        if key not in self.row:
            raise self.wrong(
                f"{key!r} is missing.{near_matches(key, self.row)} The row has: {sorted(self.row)}."
            )
        return self.row[key]

    def text(self, key: str, *, may_be_empty: bool = False) -> str:
        """A text.

        Raises:
            DataError: It is missing, something else, or empty.
        """
        value = self.value(key)
        if not isinstance(value, str):
            raise self.wrong(f"{key!r} must be text, not {type(value).__name__}.")
        if not value.strip() and not may_be_empty:
            raise self.wrong(f"{key!r} is empty.")
        return value

    def optional_text(self, key: str) -> str:
        """A text that may be missing or null: then empty."""
        return "" if self.row.get(key) is None else self.text(key, may_be_empty=True)

    def listed(self, key: str) -> list[Any]:
        """A list, or the JSON text of one, as CSV cells hold it.

        Raises:
            DataError: It is something else.
        """
        value = self.value(key)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise self.wrong(f"{key!r} is text, but not the JSON of a list ({error}).") from error
        if not isinstance(value, list):
            raise self.wrong(f"{key!r} must be a list of turns.")
        return value

    def turns(self, messages: Any) -> list[Message]:
        """Turns as chat templates take them, their contents stripped.

        Raises:
            DataError: They are malformed.
        """
        try:
            clean = normalised(messages)
        except DataError as error:
            raise self.wrong(str(error)) from error
        return [{**turn, "content": turn["content"].strip()} for turn in clean]

    def tools(self) -> tuple[Tool, ...]:
        """What the model may call.

        Raises:
            DataError: It is no list of descriptions.
        """
        if not self.row.get("tools"):
            return ()
        tools = self.listed("tools")
        for tool in tools:
            described = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if not isinstance(described, Mapping) or not isinstance(described.get("name"), str):
                raise self.wrong("each of the 'tools' must be an object that names a function.")
        return tuple(dict(tool) for tool in tools)


def readings(data: FileData, split: Split) -> Iterator[Reading]:
    """The rows of a split; each file's first row tells what all of it holds, unless the recipe does.

    Raises:
        DataError: A file is missing, empty or malformed, or its keys tell nothing.
        ConfigError: The recipe names no such split.
    """
    formats: dict[str, str] = {}
    source = source_of(data, split)
    rows = source_rows(source, data.files, data.max_rows.get(split), texts=data.texts, setting="data.files")
    for place, row in rows:
        named = _renamed(row, data.columns, place)
        kind = data.format if data.format != "auto" else formats.get(place.source)
        if kind is None:
            kind = formats[place.source] = _detect(named, place)
        yield Reading(kind, place, named, data)


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str], place: Place) -> Mapping[str, Any]:
    if not columns:
        return row
    for column in columns.values():
        if column not in row:
            raise DataError(
                f"{place}: data.columns names {column!r}, which the row has not.{near_matches(column, row)} "
                f"The row has: {sorted(row)}."
            )
    others = {key: value for key, value in row.items() if key not in columns.values()}
    return {**others, **{key: row[column] for key, column in columns.items()}}


def _detect(row: Mapping[str, Any], place: Place) -> str:
    for kind, keys in FORMATS.items():
        if all(key in row for key in keys):
            return kind
    known = "; ".join(f"{kind} ({', '.join(keys)})" for kind, keys in FORMATS.items())
    raise DataError(
        f"{place}: the keys {sorted(row)} tell no known format. The formats and their keys: {known}. "
        "Name one in data.format, and columns with other names in data.columns."
    )
