"""Values of a table's row, checked: messages name the place, the column, and the recipe's key for it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lorakit.errors import DataError, listing, near_matches
from lorakit.train.tables import Place

Row = Mapping[str, Any]


def column_value(row: Row, column: str, key: str, place: Place | str) -> Any:
    """What stands in a column.

    Raises:
        DataError: The row has no such column.
    """
    if column not in row:
        raise DataError(
            f"{place}: {column!r} is missing.{near_matches(column, row)} The row has: {listing(row)}. "
            f"data.{key} names the column."
        )
    return row[column]


def column_text(row: Row, column: str, key: str, place: Place | str) -> str:
    """A text that is not empty.

    Raises:
        DataError: It is something else.
    """
    value = column_value(row, column, key, place)
    if not isinstance(value, str):
        raise DataError(f"{place}: {column!r} must be text, not {type(value).__name__}.")
    if not value.strip():
        raise DataError(f"{place}: {column!r} is empty.")
    return value


def column_number(row: Row, column: str, key: str, place: Place | str) -> float:
    """A finite number, or the text of one, as tables hold it.

    Raises:
        DataError: It is something else.
    """
    value = column_value(row, column, key, place)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{place}: {column!r} must be a number; found {value!r}.")
    return number


def column_words(row: Row, column: str, key: str, place: Place | str) -> list[str]:
    """A list of words or whole numbers, or the JSON text of one, as tables hold it; numbers as their digits.

    Raises:
        DataError: It is something else, or empty.
    """
    value = column_value(row, column, key, place)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{place}: {column!r} is text, but not the JSON of a list ({error}).") from error
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: {column!r} must be a list of one or more words; found {value!r}.")
    for word in value:
        if isinstance(word, bool) or not isinstance(word, (str, int)) or not str(word).strip():
            raise DataError(f"{place}: {column!r} holds {word!r}, which is no word.")
    return [str(word) for word in value]
