"""Data files: the four formats, and every way in which a line can be wrong."""

from __future__ import annotations

import gzip
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError, DataError
from lorakit.tasks import text_to_sql
from lorakit.tasks.execution import judge
from lorakit.train.data import compact_schema, has_split, load_examples
from lorakit.train.recipe import BuiltinData, FileData
from tests.tiny_chat import write_rows

ONE = {"id": "a", "instruction": "Say it.", "input": "x : 1", "references": ["One.", "Uno. "]}


def load(tmp_path: Path, rows: list[Any], *, learning: bool = True, **settings: Any) -> Any:
    return load_examples(
        FileData(train=write_rows(tmp_path / "d.jsonl", rows), **settings), "train", learning=learning
    )


def test_generate_rows_give_an_example_for_each_reference_to_learn_and_one_to_score(tmp_path: Path) -> None:
    learnt = load(tmp_path, [ONE])
    assert [(e.id, e.answer) for e in learnt] == [("a#0", "One."), ("a#1", "Uno.")]
    assert learnt[0].messages == ({"role": "user", "content": "Say it.\nx : 1"},)
    (scored,) = load(tmp_path, [ONE], learning=False)
    assert (scored.answer, scored.references) == ("One.", ("One.", "Uno."))
    (first,) = load(tmp_path, [ONE], references="first")
    assert first.answer == "One."


def test_prompt_completion_and_system(tmp_path: Path) -> None:
    (example,) = load(tmp_path, [{"prompt": "2+2?", "completion": " 4"}], system="Be brief.")
    assert example.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
    )
    assert example.answer == "4"
    assert example.id == "d.jsonl:1"


def test_messages_keep_earlier_turns(tmp_path: Path) -> None:
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ciao")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (example,) = load(tmp_path, [row])
    assert [m["content"] for m in example.messages] == ["hi", "hello", "bye"]
    assert (example.answer, example.learn_all) == ("ciao", True)
    assert not load(tmp_path, [row], learn="last")[0].learn_all


def test_gzip_blank_lines_and_max_rows(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(
            "\n" + "\n\n".join(json.dumps({"prompt": str(i), "completion": "é"}) for i in range(5)) + "\n"
        )
    examples = load_examples(FileData(train=path, max_rows={"train": 3}), "train")
    assert [e.messages[0]["content"] for e in examples] == ["0", "1", "2"]
    assert examples[1].id == "d.jsonl.gz:4"


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "is empty: expected JSON lines"),
        (["", "  "], "is empty"),
        ([GOOD, "{not json"], r"line 2: not valid JSON .*one object a line"),
        ([GOOD, [1, 2]], "line 2: expected an object with named values, found list"),
        (
            [{"words": "a"}],
            r"line 1: the keys \['words'\] tell no known format.*prompt_completion \(prompt, completion\)",
        ),
        (
            [GOOD, {"prompt": "a", "complection": "b"}],
            "line 2: 'completion' is missing. Did you mean 'complection'",
        ),
        ([GOOD, {"prompt": 3, "completion": "b"}], "line 2: 'prompt' must be text, not int"),
        ([GOOD, {"prompt": "a", "completion": " "}], "line 2: 'completion' is empty"),
        ([{**ONE, "references": []}], "line 1: 'references' must be a list of one or more"),
        ([{**ONE, "references": ["a", ""]}], "line 1: 'references' holds something that is empty"),
        ([{**ONE, "references": "a"}], "line 1: 'references' must be a list"),
        ([{"messages": []}], "line 1: 'messages' must be a list of turns"),
        (
            [{"messages": [{"role": "user", "content": "a"}]}],
            "line 1: the last of the 'messages' must be the assistant's",
        ),
        (
            [{"messages": [{"role": "assistant", "content": "a"}]}],
            "line 1: the assistant's answer must follow",
        ),
        (
            [{"messages": [{"role": "bot", "content": "a"}]}],
            "line 1: the role 'bot' is none of system, developer, user, assistant, tool",
        ),
        ([{"messages": [{"role": "user"}]}], "line 1: each of the 'messages' must be an object"),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}],
            "line 1: an answer of the assistant is empty",
        ),
    ],
)
def test_bad_files_name_the_line(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        load(tmp_path, rows)
    assert "d.jsonl" in str(caught.value)


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [GOOD])
    with pytest.raises(DataError, match=r"There is no data file .*tran\.jsonl\. Did you mean 'train\.jsonl'"):
        load_examples(FileData(train=tmp_path / "tran.jsonl"), "train")


def test_cut_off_gzip_and_wrong_encoding(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(GOOD) + "\n").encode() * 5000)[:-20])
    with pytest.raises(DataError, match="damaged or cut off"):
        load_examples(FileData(train=path), "train")
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="damaged or cut off"):
        load_examples(FileData(train=path), "train")
    plain = tmp_path / "d.jsonl"
    plain.write_bytes(b'{"prompt": "\xff", "completion": "b"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        load_examples(FileData(train=plain), "train")


def test_split_that_the_recipe_does_not_name(tmp_path: Path) -> None:
    data = FileData(train=tmp_path / "x.jsonl")
    assert has_split(data, "train")
    assert not has_split(data, "test")
    with pytest.raises(ConfigError, match=r"no file for the test split: set data\.test"):
        load_examples(data, "test")
    with pytest.raises(ConfigError, match=r"set data\.valid to a number"):
        load_examples(BuiltinData(builtin="text_to_sql", valid=0), "valid")


def test_builtin_task() -> None:
    data = BuiltinData(builtin="text_to_sql", train=3, test=2)
    (first, *_), made = load_examples(data, "train"), text_to_sql.generate("train", 3)[0]
    assert first.messages == tuple(text_to_sql.messages(made))
    assert first.answer == made.sql
    assert first.case is not None
    assert judge(first.answer, first.case()).correct


# ---- text2sql ------------------------------------------------------------------------------------------------------
DDL = 'CREATE TABLE "city" ("name" text, population int DEFAULT NULL);\nCREATE TABLE river (name TEXT);'


@pytest.fixture
def databases(tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "db"
    folder.mkdir()
    with closing(sqlite3.connect(folder / "geo.sqlite")) as connection, connection:
        connection.executescript(DDL)
        connection.executemany("INSERT INTO city VALUES (?, ?)", [("Bonn", 3), ("Ulm", 1)])
    schemas = tmp_path / "schemas.json"
    schemas.write_text(json.dumps({"geo": DDL}), encoding="utf-8")
    return {"databases": folder, "schemas": schemas}


def test_compact_schema() -> None:
    assert compact_schema(DDL) == "city(name TEXT, population INT)\nriver(name TEXT)"


def test_text2sql_rows_can_be_asked_and_judged(tmp_path: Path, databases: dict[str, Any]) -> None:
    row = {
        "db_id": "geo",
        "question": "Largest city?",
        "sql": "SELECT name FROM city\n ORDER BY population DESC LIMIT 1 ;",
        "rows": 1,
        "ordered": True,
    }
    (example,) = load(tmp_path, [row], **databases)
    assert "city(name TEXT, population INT)" in example.messages[0]["content"]
    assert "Largest city?" in example.messages[0]["content"]
    assert example.answer == "SELECT name FROM city ORDER BY population DESC LIMIT 1"
    assert judge("SELECT 'Bonn'", example.case()).correct
    assert not judge("SELECT 'Ulm'", example.case()).correct


def test_text2sql_mistakes(tmp_path: Path, databases: dict[str, Any]) -> None:
    row = {"db_id": "geo", "question": "q", "sql": "SELECT nothing FROM city"}
    (example,) = load(tmp_path, [row], **databases)
    with pytest.raises(DataError, match=r"d\.jsonl, line 1: the gold query does not run"):
        example.case()
    with pytest.raises(DataError, match=r"line 1: .*no schema for db_id 'go'. Did you mean 'geo'"):
        load(tmp_path, [{**row, "db_id": "go"}], **databases)
    with pytest.raises(DataError, match="line 1: 'ordered' must be true or false"):
        load(tmp_path, [{**row, "ordered": 1}], **databases)
    with pytest.raises(ConfigError, match=r"needs data\.schemas"):
        load(tmp_path, [row])
    assert load(tmp_path, [row], schemas=databases["schemas"])[0].case is None
