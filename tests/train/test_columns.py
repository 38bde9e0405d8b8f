"""Values of a table's row."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.errors import DataError
from lorakit.train.columns import column_number, column_text, column_value, column_words


def test_what_is_read() -> None:
    row = {"a": "x", "n": "1.5", "w": '["u", 2]', "l": ["v"]}
    assert column_text(row, "a", "text", "p") == "x"
    assert column_number(row, "n", "label", "p") == 1.5
    assert column_words(row, "w", "tokens", "p") == ["u", "2"]
    assert column_words(row, "l", "tokens", "p") == ["v"]


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (column_value, {"aa": 1}, r"p: 'a' is missing\. Did you mean 'aa'\? The row has: aa\. data\.k names"),
        (column_text, {"a": 1}, "'a' must be text, not int"),
        (column_text, {"a": " "}, "'a' is empty"),
        (column_number, {"a": "x"}, "'a' must be a number; found 'x'"),
        (column_number, {"a": True}, "'a' must be a number; found True"),
        (column_words, {"a": "x y"}, "not the JSON of a list"),
        (column_words, {"a": [""]}, "holds '', which is no word"),
        (column_words, {"a": [1.5]}, r"holds 1\.5, which is no word"),
    ],
)
def test_what_is_wrong(read: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(row, "a", "k", "p")
