"""What the field `model` means."""

from __future__ import annotations

import pytest

from lorakit.errors import InvalidAdapterIdError, InvalidRequestError
from lorakit.serve.api.naming import MOST_PARTS, parse_model


def test_base_adapter_and_version() -> None:
    assert parse_model("org/base", "org/base").names == ()
    assert parse_model("sql", "base").name == "sql"
    assert parse_model("sql@2", "base").name == "sql@2"


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("a:0.5+b:0.5", {"a": 0.5, "b": 0.5}),
        ("a+b", {"a": 1.0, "b": 1.0}),
        ("a:.5", {"a": 0.5}),
        ("a@2:1+a@3:-1", {"a@2": 1.0, "a@3": -1.0}),
        ("a : 2 + b", {"a": 2.0, "b": 1.0}),
    ],
)
def test_mixes(text: str, mix: dict[str, float]) -> None:
    wanted = parse_model(text, "base")
    assert wanted.mix == mix
    assert wanted.names == tuple(mix)


@pytest.mark.parametrize(
    "text",
    [
        "a:x",
        "a:1e5",
        "a:nan",
        "a:inf",
        "a:1:2",
        "a:",
        "a+a",
        "+".join(f"a{i}" for i in range(MOST_PARTS + 1)),
    ],
)
def test_mixes_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_model(text, "base")


@pytest.mark.parametrize("text", ["", "a+", ":1", "a++b", "../a", "a:1+../b:1"])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(InvalidAdapterIdError):
        parse_model(text, "base")
