"""Formats: every one from a real file, told by its keys, with columns of other names, and mistakes with their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import DataError
from lorakit.train.data import load_examples
from lorakit.train.data_sections import FileData
from lorakit.train.examples import Example
from lorakit.train.formats import FORMATS
from tests.tiny_chat import write_rows


def load(tmp_path: Path, *rows: Any, learning: bool = True, **settings: Any) -> list[Example]:
    data = FileData(train=write_rows(tmp_path / "d.jsonl", list(rows)), **settings)
    return load_examples(data, "train", learning=learning)


def asked(example: Example) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in example.messages]


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


# ---- messages
def talk(*turns: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"messages": list(turns), **rest}


def user(text: Any, **rest: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **rest}


def assistant(text: Any, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **rest}


LONG = talk(user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f"))


def test_messages_say_which_turns_are_learnt(tmp_path: Path) -> None:
    (every,) = load(tmp_path, LONG)
    assert every.learnt_turns == (1, 3, 5)
    (last,) = load(tmp_path, LONG, learn="last")
    assert last.learnt_turns == (5,)
    marked = talk(
        user("a"), assistant("b", loss=False), user("c", weight=0), assistant("d", weight=1), user("e"),
        assistant("f", weight=0),
    )  # fmt: skip
    (some,) = load(tmp_path, marked)
    assert some.learnt_turns == (3,)
    assert all(turn.keys() == {"role", "content"} for turn in some.turns)
    (system,) = load(tmp_path, marked, system="S")
    assert system.learnt_turns == (4,)
    (wanted,) = load(
        tmp_path, talk(user("a"), assistant("b", loss=True), user("c"), assistant("d")), learn="last"
    )
    assert wanted.learnt_turns == (1, 3)


def test_each_answer_in_a_row_of_its_own(tmp_path: Path) -> None:
    first, second, third = load(tmp_path, LONG, learn="each")
    assert [e.answer for e in (first, second, third)] == ["b", "d", "f"]
    assert asked(second) == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert [e.learnt_turns for e in (first, second, third)] == [(1,), (3,), (5,)]
    assert len({first.id, second.id, third.id}) == 3
    with pytest.raises(DataError, match=r"line 1: with data\.learn: each"):
        load(
            tmp_path, talk(user("a"), assistant("b"), assistant("c"), user("d"), assistant("e")), learn="each"
        )


def test_a_greeting_has_no_prompt(tmp_path: Path) -> None:
    (example,) = load(tmp_path, talk(assistant("hi"), user("a"), assistant("b")))
    assert example.learnt_turns == (2,)
    with pytest.raises(DataError, match="line 1: the first turn cannot be learnt"):
        load(tmp_path, talk(assistant("hi", loss=True), user("a"), assistant("b")))


def test_tools_are_called_and_answer(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    row = talk(
        user("Bonn?"), assistant(None, tool_calls=[call]), {"role": "tool", "content": "rain", "tool_call_id": "1"},
        assistant("Rain."), tools=[WEATHER],
    )  # fmt: skip
    (example,) = load(tmp_path, row)
    assert example.tools == (WEATHER,)
    assert example.messages[1]["content"] == ""
    assert example.messages[1]["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": {"city": "Bonn"},
    }
    assert example.learnt_turns == (1, 3)
    (written,) = load(tmp_path, {**row, "tools": json.dumps([WEATHER])})  # as CSV and many data sets have it
    assert written.tools == (WEATHER,)
    (calling,) = load(tmp_path, talk(user("Bonn?"), assistant("", tool_calls=[call]), tools=[WEATHER]))
    assert (calling.answer, len(calling.calls)) == ("", 1)


def test_parts_of_text_and_a_developer(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (example,) = load(tmp_path, talk({"role": "developer", "content": "S"}, user(parts), assistant("c")))
    assert asked(example) == [("system", "S"), ("user", "ab")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (talk(user("a"), assistant("b", loss=False)), "no answer is left to learn"),
        (talk(user("a"), assistant("b", loss="no")), "the 'loss' of a turn must be true or false; found 'no'"),
        (talk(user("a"), assistant("b", weight=0.5)), r"the 'weight' of a turn must be 0 or 1; found 0\.5"),
        (talk(user("a"), assistant("b", weight=True)), "must be 0 or 1; found True"),
        (talk(user("a"), assistant("b", weight=0, loss=True)), "contradict each other"),
        (talk(user("a", loss=True), assistant("b")), "only the assistant's turns can be learnt"),
        (
            talk(user([{"type": "image_url"}]), assistant("b")),
            "part of a 'content' must be text; found 'image_url'",
        ),
        (talk(user("a", tool_calls=[{}]), assistant("b")), "only the assistant calls tools"),
        (talk(user("a"), assistant("", tool_calls=[{"x": 1}])), "must have a 'function' with a 'name'"),
        (
            talk(user("a"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])),
            "arguments of the call of 'f' are not valid JSON",
        ),
        (
            talk(user("a"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "[]"}}])),
            "arguments of the call of 'f' must be an object",
        ),
        (talk(user("a"), assistant("b"), tools="{"), "'tools' is text, but not the JSON of a list"),
        (talk(user("a"), assistant("b"), tools=[{"description": "x"}]), "must be an object that names a function"),
        (talk(user("a"), assistant("b"), tools={"a": 1}), "'tools' must be a list"),
    ],
)  # fmt: skip
def test_wrong_messages(tmp_path: Path, row: Any, words: str) -> None:
    with pytest.raises(DataError, match=rf"d\.jsonl, line 2: .*{words}"):
        load(tmp_path, LONG, row)


# ---- the other formats
def test_sharegpt(tmp_path: Path) -> None:
    row = {
        "system": "S",
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b", "loss": False},
            {"from": "human", "value": "c"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Ulm"}}'},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "d"},
        ],
        "tools": [WEATHER],
    }
    (example,) = load(tmp_path, row)
    assert [role for role, _ in asked(example)] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
    ]
    assert example.messages[4]["tool_calls"][0]["function"]["arguments"] == {"city": "Ulm"}
    assert example.learnt_turns == (4, 6)
    (openai,) = load(tmp_path, {"conversations": [user("a"), assistant("b")]})
    assert (asked(openai), openai.answer) == ([("user", "a")], "b")
    for turn, words in (
        ({"from": "cat", "value": "x"}, "from 'cat', which is none of system, human"),
        ({"from": "gpt"}, "a 'role' and a text 'content'"),
        ({"from": "function_call", "value": "{"}, "function call is not valid JSON"),
        (3, "must be an object"),
    ):
        with pytest.raises(DataError, match=rf"line 1: .*{words}"):
            load(tmp_path, {"conversations": [{"from": "human", "value": "a"}, turn]})


def test_alpaca(tmp_path: Path) -> None:
    plain = {"instruction": "Add.", "input": "1 2", "output": "3"}
    full = {**plain, "input": None, "system": "S", "history": [["q", "r"]]}
    short, long = load(tmp_path, plain, full)
    assert (asked(short), short.answer) == ([("user", "Add.\n1 2")], "3")
    assert asked(long) == [("system", "S"), ("user", "q"), ("assistant", "r"), ("user", "Add.")]
    assert long.learnt_turns == (4 - 0,)
    with pytest.raises(DataError, match="line 1: 'history' must be a list of pairs"):
        load(tmp_path, {**plain, "history": [["q"]]})
    with pytest.raises(DataError, match="line 1: 'output' is empty"):
        load(tmp_path, {**plain, "output": ""})


def test_prompt_and_completion_as_messages(tmp_path: Path) -> None:
    row = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}
    (example,) = load(tmp_path, row)
    assert (len(example.messages), example.answer, example.learnt_turns) == (3, "d", (3,))


def test_plain_text(tmp_path: Path) -> None:
    (example,) = load(tmp_path, {"text": "Once upon a time.\n"}, system="not for texts")
    assert (example.messages, example.answer, example.divide) == ((), "Once upon a time.\n", True)
    assert not load(tmp_path, {"text": "x"}, divide=False)[0].divide


def test_seq2seq(tmp_path: Path) -> None:
    rows = [{"source": "one", "target": "eins "}, {"source": "two", "target": ["zwei", "zwo"]}]
    assert [e.answer for e in load(tmp_path, *rows)] == ["eins", "zwei", "zwo"]
    scored = load(tmp_path, *rows, learning=False)
    assert [e.references for e in scored] == [("eins",), ("zwei", "zwo")]
    with pytest.raises(DataError, match="line 1: 'target' holds something that is empty"):
        load(tmp_path, {"source": "a", "target": ["b", ""]})


def test_chosen_and_rejected_answers_are_refused_where_one_answer_is_learnt(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match=r"line 1: chosen and rejected answers are for task: dpo"):
        load(tmp_path, row)
    (example,) = load(tmp_path, row, format="prompt_completion", columns={"completion": "chosen"})
    assert example.answer == "b"


# ---- detection, columns, places
def test_every_format_is_told_by_its_keys(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "messages": [user("a"), assistant("b")],
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "references": ["b"],
    }
    for kind, keys in FORMATS.items():
        if kind in ("preference", "text2sql"):
            continue  # told in test_pairs.py and test_data.py
        row = {"id": 7, **{key: values.get(key, "b") for key in keys}}
        (example,) = load(tmp_path, row)
        assert (example.id, example.answer) == ("7", "b")
        assert example.where.endswith("d.jsonl, line 1")


def test_the_format_can_be_named_against_the_keys(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "text": "c"}
    assert load(tmp_path, row)[0].answer == "b"
    assert load(tmp_path, row, format="text")[0].answer == "c"
    with pytest.raises(DataError, match="line 1: 'messages' is missing"):
        load(tmp_path, row, format="messages")


def test_columns_with_other_names(tmp_path: Path) -> None:
    rows = [{"q": "a", "a": "b"}, {"q": "c", "a": "d"}]
    found = load(tmp_path, *rows, columns={"prompt": "q", "completion": "a"})
    assert [(e.messages[0]["content"], e.answer) for e in found] == [("a", "b"), ("c", "d")]
    with pytest.raises(
        DataError, match=r"line 2: data\.columns names 'q', which the row has not\. Did you mean 'qq'"
    ):
        load(tmp_path, rows[0], {"qq": "a", "a": "b"}, columns={"prompt": "q", "completion": "a"})


def test_columns_can_swap_their_names(tmp_path: Path) -> None:
    (example,) = load(
        tmp_path,
        {"prompt": "a", "completion": "b"},
        columns={"prompt": "completion", "completion": "prompt"},
    )
    assert (example.messages[0]["content"], example.answer) == ("b", "a")
