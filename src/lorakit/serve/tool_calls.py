"""Calls of tools in the text of an answer, as models are taught to write them: found piece by piece, or forced.

| format | how a call is written | who writes it |
|---|---|---|
| `HERMES` | ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` | Hermes, Qwen2.5, Qwen3, SmolLM3 |
| `MISTRAL` | ``[TOOL_CALLS][{"name": ..., "arguments": {...}}]``, or ``[TOOL_CALLS]name[ARGS]{...}`` | Mistral |
| `LLAMA` | ``{"name": ..., "parameters": {...}}`` and nothing else, after ``<|python_tag|>`` or not | Llama 3 |
| `PLAIN` | ``{"name": ..., "arguments": {...}}`` and nothing else | any other template |
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorakit.serve.detokenize import overlap
from lorakit.serve.requests import Grammar

_PYTHON_TAG = "<|python_tag|>"
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(\{.*\})\s*", re.DOTALL)
_DECODER = json.JSONDecoder()
# For llguidance: spaces where templates' `tojson` puts them, so that no answer is filled up with spaces.
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written.

    Attributes:
        opening: What stands before them; empty where the answer is nothing but calls.
        closing: What stands after each; empty where the next opening or the end of the answer ends it.
        arguments: The key of a call's arguments.
        prompt: What the prompt ends with where a call is forced, so that the model goes on with the call itself.
        listed: Whether a call is forced as a list of one.
        marks: Words of it that may be special tokens, which are otherwise left out of texts.
    """

    opening: str = ""
    closing: str = ""
    arguments: str = "arguments"
    prompt: str = ""
    listed: bool = False
    marks: tuple[str, ...] = ()


HERMES = ToolFormat(
    "<tool_call>", "</tool_call>", prompt="<tool_call>\n", marks=("<tool_call>", "</tool_call>")
)
MISTRAL = ToolFormat(
    "[TOOL_CALLS]",
    prompt="[TOOL_CALLS]",
    listed=True,
    marks=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
)
LLAMA = ToolFormat(arguments="parameters", marks=(_PYTHON_TAG,))
PLAIN = ToolFormat()


def format_of(template: str) -> ToolFormat:
    """How a chat template shows calls, and so how the model was taught to write them."""
    for mark, found in (("<tool_call>", HERMES), ("[TOOL_CALLS]", MISTRAL), (_PYTHON_TAG, LLAMA)):
        if mark in template:
            return found
    return LLAMA if '"parameters": dictionary' in template else PLAIN


class Call(NamedTuple):
    """One call: the tool's name, and its arguments as JSON text."""

    name: str
    arguments: str


class CallReader:
    """Takes an answer apart, piece by piece, into text and calls.

    Text comes as soon as it is certain to be none of a call, a call when it is complete. What looks like a call and is
    none comes as text, as it was written: nothing is lost.

    Attributes:
        count: Calls so far.
    """

    def __init__(self, written: ToolFormat, tools: Collection[str]) -> None:
        """Begin an answer.

        Args:
            written: How calls are written.
            tools: The names that may be called. An answer that is JSON is only a call where its name is one of them;
                what stands between marks of a call is one for any name, and the client must say so to its model.
        """
        self._format, self._tools = written, frozenset(tools)
        self._held, self._inside, self._text_only = "", not written.opening, False
        self._space = ""  # before what may be a call: not said if it is one
        self.count = 0

    def add(self, piece: str) -> list[str | Call]:
        """What has become certain by a further piece of the answer."""
        self._held += piece
        if self._text_only:
            return self._give_up()
        if not self._format.opening:
            return [] if _may_be_json(self._held) else self._give_up()
        return list(self._pieces())

    def finish(self) -> list[str | Call]:
        """The rest, as the answer is over."""
        held, self._held = self._held, ""
        if self._inside and not self._text_only:
            return list(self._read(held, self._format.opening, ""))
        return [held] if held.strip() or (held and not self.count) else []

    def _give_up(self) -> list[str | Call]:
        self._text_only = True
        held, self._held = self._held, ""
        return [held] if held else []

    def _pieces(self) -> Iterator[str | Call]:
        opening, closing = self._format.opening, self._format.closing
        while True:
            end = (closing or opening) if self._inside else opening
            before, mark, rest = self._held.partition(end)
            if not mark:
                if not self._inside:
                    certain = before[: len(before) - overlap(before, opening)].rstrip()
                    self._held = before[len(certain) :]
                    if certain:
                        yield certain
                return
            self._held = rest
            if not self._inside:
                self._inside = True
                text = before.rstrip()
                self._space = before[len(text) :]
                if text:
                    yield text
            else:
                self._inside = not closing
                yield from self._read(before, opening, closing)

    def _read(self, body: str, opening: str, closing: str) -> Iterator[str | Call]:
        calls = calls_in(body, None if opening else self._tools)
        if calls:
            self.count += len(calls)
            yield from calls
        elif text := self._space + opening + body + closing:
            yield text
        self._space = ""


def calls_in(text: str, tools: Collection[str] | None = None) -> list[Call]:
    """The calls that a text consists of; none if it is anything else.

    Args:
        text: JSON objects or lists of such, one after the other or with semicolons or commas between; or a name and
            an object of arguments.
        tools: The names that count; None for any.
    """
    text = text.strip().removeprefix(_PYTHON_TAG).strip()
    found: list[Any] = []
    at = 0
    try:
        while at < len(text):
            value, at = _DECODER.raw_decode(text, at)
            found += value if isinstance(value, list) else [value]
            while at < len(text) and (text[at].isspace() or text[at] in ";,"):
                at += 1
    except (ValueError, RecursionError):
        named = _NAMED.fullmatch(text)
        if at or named is None:
            return []
        try:
            found = [{"name": named[1], "arguments": json.loads(named[2])}]
        except (ValueError, RecursionError):
            return []
    calls = [_call(value) for value in found]
    known = [call for call in calls if call is not None and (tools is None or call.name in tools)]
    return known if len(known) == len(calls) else []


def _call(value: Any) -> Call | None:
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON within JSON
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, Mapping):
        return None
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def _may_be_json(text: str) -> bool:
    start = text.lstrip()
    return not start or start[0] in "{[" or start.startswith(_PYTHON_TAG) or _PYTHON_TAG.startswith(start)


def forced(written: ToolFormat, tools: Mapping[str, Mapping[str, Any]]) -> Grammar:
    """The grammar of exactly one call, after the format's ``prompt``.

    Args:
        written: How calls are written.
        tools: The schema of the arguments of each tool that may be called.
    """
    definitions: dict[str, Any] = {}
    choices = []
    for number, (name, schema) in enumerate(tools.items()):
        definitions |= _definitions(number, schema)
        choices.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    written.arguments: {"$ref": f"#/$defs/{number}"},
                },
                "required": ["name", written.arguments],
                "additionalProperties": False,
            }
        )
    call: dict[str, Any] = choices[0] if len(choices) == 1 else {"anyOf": choices}
    whole = {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if written.listed else call
    return Grammar("json_schema", json.dumps({**whole, "$defs": definitions, "x-guidance": _SPACES}))


def _definitions(number: int, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's schema and those that it defines itself, under names that no other tool's have."""

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: _moved_reference(number, v) if k == "$ref" else moved(v) for k, v in value.items()}
        return (
            [moved(item) for item in value]
            if isinstance(value, Sequence) and not isinstance(value, str)
            else value
        )

    own = {
        key: value for key, value in schema.items() if key not in ("$defs", "definitions", "$schema", "$id")
    }
    found = {str(number): moved({"type": "object", **own})}
    for group in ("$defs", "definitions"):
        for name, definition in (schema.get(group) or {}).items():
            found[f"{number}.{name}"] = moved(definition)
    return found


def _moved_reference(number: int, reference: Any) -> Any:
    if reference == "#":
        return f"#/$defs/{number}"
    for group in ("#/$defs/", "#/definitions/"):
        if isinstance(reference, str) and reference.startswith(group):
            return f"#/$defs/{number}.{reference.removeprefix(group)}"
    return reference
