"""Pairs: chosen and rejected answers in the forms that people have them in, and sources with targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import DataError
from lorakit.train.data_sections import BuiltinData, FileData
from lorakit.train.pairs import load_pairs, load_preferences
from tests.tiny_chat import write_rows

USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}


def file(tmp_path: Path, *rows: Any, **settings: Any) -> FileData:
    return FileData(train=write_rows(tmp_path / "p.jsonl", list(rows)), **settings)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good ", "rejected": "bad"},
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_every_form_is_the_same_preference(tmp_path: Path, row: dict[str, Any]) -> None:
    (found,) = load_preferences(file(tmp_path, row), "train")
    assert (found.messages, found.chosen, found.rejected) == ((USER,), "good", "bad")
    chosen, rejected = found.examples
    assert (chosen.messages, chosen.answer, rejected.answer) == ((USER,), "good", "bad")
    assert found.place.endswith("p.jsonl, line 1")
    (system,) = load_preferences(file(tmp_path, row, system="S"), "train")
    assert system.messages == ({"role": "system", "content": "S"}, USER)


def test_a_system_turn_in_the_conversations_beside_a_plain_prompt(tmp_path: Path) -> None:
    system = {"role": "system", "content": "S"}
    row = {"prompt": "q", "chosen": [system, USER, GOOD], "rejected": [system, USER, BAD]}
    (found,) = load_preferences(file(tmp_path, row), "train")
    assert found.messages == (system, USER)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": "a", "rejected": "b"}, "there is no prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "a "}, "are the same answer"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": [BAD]}, "must both be texts, or both lists"),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [USER]}, "'rejected' must end with an answer"),
        (
            {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "other"}, BAD]},
            "must begin alike",
        ),
        ({"prompt": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "are different conversations"),
        ({"prompt": "x", "completion": "y"}, "format prompt_completion have no 'chosen'"),
    ],
)
def test_wrong_preferences_are_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=rf"p\.jsonl, line 1: .*{words}"):
        load_preferences(file(tmp_path, row), "train")
    with pytest.raises(DataError, match="read from files"):
        load_preferences(BuiltinData(builtin="text_to_sql"), "train")


def test_pairs_from_every_format_with_one_prompt(tmp_path: Path) -> None:
    rows = [
        {"source": "q", "target": "a"},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"messages": [USER, {"role": "assistant", "content": "a"}]},
    ]
    for row in rows:
        (pair,) = load_pairs(file(tmp_path, row), "train", learning=True)
        assert (pair.source, pair.target, pair.references) == ("q", "a", ("a",))
    (prefixed,) = load_pairs(file(tmp_path, rows[0], system="translate:"), "train")
    assert prefixed.source == "translate:\nq"
    several = {"source": "q", "target": ["a", "b"]}
    assert [p.target for p in load_pairs(file(tmp_path, several), "train", learning=True)] == ["a", "b"]
    assert load_pairs(file(tmp_path, several), "train")[0].references == ("a", "b")


def test_longer_conversations_are_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p\.jsonl, line 1: .*a conversation of several turns"):
        load_pairs(file(tmp_path, {"messages": [USER, GOOD, USER, BAD]}), "train")
    with pytest.raises(DataError, match="this row is a plain text"):
        load_pairs(file(tmp_path, {"text": "x"}), "train")
