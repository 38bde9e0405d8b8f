"""Calls in an answer: found in every format, at any cut of the pieces, and never at the cost of text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lorakit.serve.tool_calls import (
    HERMES,
    LLAMA,
    MISTRAL,
    PLAIN,
    Call,
    CallReader,
    ToolFormat,
    calls_in,
    forced,
    format_of,
)

TOOLS = ["get_weather", "add"]
WEATHER = Call("get_weather", '{"city": "Köln"}')
ADD = Call("add", '{"a": 1, "b": [2, {"c": null}]}')


def read(written: ToolFormat, *pieces: str) -> list[str | Call]:
    """What comes of an answer, neighbouring texts joined."""
    reader = CallReader(written, TOOLS)
    found = [item for piece in pieces for item in reader.add(piece)] + reader.finish()
    joined: list[str | Call] = []
    for item in found:
        if isinstance(item, str) and joined and isinstance(joined[-1], str):
            joined[-1] += item
        else:
            joined.append(item)
    assert reader.count == sum(isinstance(item, Call) for item in joined)
    return joined


def tagged(call: Call) -> str:
    return f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'


ANSWERS: list[tuple[ToolFormat, str, list[str | Call]]] = [
    (HERMES, tagged(WEATHER), [WEATHER]),
    (HERMES, f"Let me see.\n{tagged(WEATHER)}\n{tagged(ADD)}", ["Let me see.", WEATHER, ADD]),
    (HERMES, f"{tagged(ADD)}\nDone.", [ADD, "\nDone."]),
    (HERMES, tagged(WEATHER).removesuffix("</tool_call>"), [WEATHER]),
    (HERMES, "<tool_call>no JSON</tool_call>", ["<tool_call>no JSON</tool_call>"]),
    (HERMES, '<tool_call>{"name": "add", "argu', ['<tool_call>{"name": "add", "argu']),
    (HERMES, "a < b and <tool_box> \n", ["a < b and <tool_box> \n"]),
    (HERMES, '{"name": "add", "arguments": {}}', ['{"name": "add", "arguments": {}}']),
    (HERMES, tagged(Call("unknown", "{}")), [Call("unknown", "{}")]),
    (MISTRAL, f'[TOOL_CALLS][{{"name": "add", "arguments": {ADD.arguments}}}]', [ADD]),
    (
        MISTRAL,
        'Yes. [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Köln"}, "id": "a"},'
        f' {{"name": "add", "arguments": {ADD.arguments}}}]',
        ["Yes.", WEATHER, ADD],
    ),
    (
        MISTRAL,
        f"[TOOL_CALLS]get_weather[ARGS]{WEATHER.arguments}[TOOL_CALLS]add{ADD.arguments}",
        [WEATHER, ADD],
    ),
    (MISTRAL, f"[TOOL_CALLS]add[CALL_ID]Abc123def[ARGS]{ADD.arguments}", [ADD]),
    (MISTRAL, "[TOOL_CALLS] what?", ["[TOOL_CALLS] what?"]),
    (LLAMA, f'{{"name": "add", "parameters": {ADD.arguments}}}', [ADD]),
    (LLAMA, f'<|python_tag|>{{"type": "function", "name": "add", "parameters": {ADD.arguments}}}', [ADD]),
    (
        LLAMA,
        '{"name": "get_weather", "parameters": {"city": "Köln"}}; '
        f'{{"name": "add", "parameters": {ADD.arguments}}}',
        [WEATHER, ADD],
    ),
    (LLAMA, '{"name": "someone", "age": 3}', ['{"name": "someone", "age": 3}']),
    (LLAMA, '{"name": "add", "parameters": {"a": 1', ['{"name": "add", "parameters": {"a": 1']),
    (LLAMA, "<|python is a snake", ["<|python is a snake"]),
    (LLAMA, "The answer is {3}.", ["The answer is {3}."]),
    (PLAIN, '{"name": "add", "arguments": "{\\"a\\": 1}"}', [Call("add", '{"a": 1}')]),
    (PLAIN, '[{"function": {"name": "add", "arguments": {}}, "type": "function"}]', [Call("add", "{}")]),
    (PLAIN, "[1, 2]", ["[1, 2]"]),
    (PLAIN, "", []),
    (PLAIN, "  \n", ["  \n"]),
]


@pytest.mark.parametrize(("written", "answer", "wanted"), ANSWERS)
def test_whole_and_letter_by_letter(written: ToolFormat, answer: str, wanted: list[str | Call]) -> None:
    assert read(written, answer) == wanted
    assert read(written, *answer) == wanted


@given(data=st.data(), case=st.sampled_from(ANSWERS))
def test_the_cut_of_the_pieces_changes_nothing(data: st.DataObject, case: Any) -> None:
    written, answer, wanted = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=6)))
    assert (
        read(written, *(answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True))) == wanted
    )


@example(pieces=["0", " \n", "[TOOL_CALLS]"], written=MISTRAL)
@given(
    pieces=st.lists(
        st.text(max_size=8) | st.sampled_from(["<tool_", "call>", "</tool_call>", "{", "[TOOL_CALLS]"])
    ),
    written=st.sampled_from([HERMES, MISTRAL, LLAMA, PLAIN]),
)
def test_what_is_no_call_comes_out_as_it_was(pieces: list[str], written: ToolFormat) -> None:
    found = read(written, *pieces)
    text = "".join(pieces)
    assert not [item for item in found if isinstance(item, Call)]
    assert "".join(map(str, found)) == text


def test_text_is_not_held_back_longer_than_needed() -> None:
    reader = CallReader(HERMES, TOOLS)
    assert reader.add("Hello <") == ["Hello"]
    assert reader.add("b> you") == [" <b> you"]
    assert reader.add(" \n<tool_call>") == []
    assert reader.add('{"name": "add"}</tool_call>') == [Call("add", "{}")]
    plain = CallReader(PLAIN, TOOLS)
    assert plain.add(" \n") == []
    assert plain.add("It") == [" \nIt"]
    assert plain.add(" is") == [" is"]


def test_formats_by_their_templates() -> None:
    assert format_of("... <tool_call>\n{'name' ...") is HERMES
    assert format_of("{{ '[TOOL_CALLS]' }}") is MISTRAL
    assert format_of('{"name": function name, "parameters": dictionary of argument name}') is LLAMA
    assert format_of("{{ tools | tojson }}") is PLAIN


def test_deep_nesting_is_text() -> None:
    deep = "[" * 100_000
    assert calls_in(deep) == []
    assert calls_in("add" + "{" * 100_000 + "}") == []


def test_forced_calls_keep_each_tools_own_definitions() -> None:
    point = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    nested = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/point"}, "next": {"$ref": "#"}},
        "required": ["at"],
        "$defs": {"point": point},
    }
    schema = json.loads(forced(PLAIN, {"go": nested, "stay": {"$defs": {"point": {"type": "null"}}}}).value)
    assert schema["$defs"]["0.point"] == point
    assert schema["$defs"]["1.point"] == {"type": "null"}
    assert schema["$defs"]["0"]["properties"] == {
        "at": {"$ref": "#/$defs/0.point"},
        "next": {"$ref": "#/$defs/0"},
    }
    assert [choice["properties"]["name"] for choice in schema["anyOf"]] == [
        {"const": "go"},
        {"const": "stay"},
    ]
    listed = json.loads(forced(MISTRAL, {"go": nested}).value)
    assert (listed["type"], listed["minItems"], listed["maxItems"]) == ("array", 1, 1)
