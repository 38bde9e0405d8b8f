"""Tools in a conversation: shown to the model by its chat template, and its calls told as OpenAI tells them."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import InvalidRequestError
from lorakit.models.conversation import ConversationRenderer, Tool
from lorakit.serve.requests import Grammar, TokenEvent
from lorakit.serve.tool_calls import Call, CallReader, ToolFormat, forced, format_of

if TYPE_CHECKING:
    from lorakit.serve.api.schemas.chat import ChatRequest

_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolUse:
    """What a request says of tools.

    Attributes:
        shown: What the template shows.
        written: How the model writes calls.
        names: What may be called.
        forced: The grammar of the call, where there has to be one.
        named: Whether the request says which.
        several: Whether an answer may hold more than one call.
        marks: The texts of special tokens that are part of a call.
        prompt: What the prompt ends with beside the conversation.
    """

    shown: list[Tool]
    written: ToolFormat
    names: frozenset[str]
    forced: Grammar | None
    named: bool
    several: bool
    marks: Mapping[int, str]
    prompt: str = ""


def tool_use(renderer: ConversationRenderer, asked: ChatRequest) -> ToolUse | None:
    """What a request says of tools; None where the model is to know of none."""
    choice = asked.tool_choice or "auto"
    if not asked.tools or choice == "none":
        return None
    written = format_of(_template(renderer))
    tools = {tool.function.name: tool.function for tool in asked.tools}
    schemas = {name: function.parameters or {"properties": {}} for name, function in tools.items()}
    grammar = None
    if not isinstance(choice, str):
        grammar = forced(written, {choice.function.name: schemas[choice.function.name]})
    elif choice == "required":
        grammar = forced(written, schemas)
    added = renderer.tokenizer.added_tokens_decoder.items()
    return ToolUse(
        shown=[tool.shown for tool in asked.tools],
        written=written if grammar is None else ToolFormat(arguments=written.arguments),
        names=frozenset(tools),
        forced=grammar,
        named=not isinstance(choice, str),
        several=asked.parallel_tool_calls is not False,
        marks={
            number: str(token) for number, token in added if token.special and str(token) in written.marks
        },
        prompt="" if grammar is None else written.prompt,
    )


def _template(renderer: ConversationRenderer) -> str:
    template: Any = getattr(renderer.tokenizer, "chat_template", None) or ""
    if isinstance(template, Mapping):  # several by name; transformers takes this one where there are tools
        template = template.get("tool_use") or template.get("default") or ""
    return str(template)


class Message:
    """One answer as it grows, told in OpenAI's pieces of a message.

    Attributes:
        text: So far.
        calls: So far, as ``tool_calls`` holds them.
    """

    def __init__(self, use: ToolUse | None) -> None:
        self._use = use
        self._reader = None if use is None else CallReader(use.written, use.names)
        self.text = ""
        self.calls: list[dict[str, Any]] = []

    def add(self, event: TokenEvent) -> list[dict[str, Any]]:
        """The deltas that a further token makes certain."""
        if self._reader is None or self._use is None:
            self.text += event.text
            return [{"content": event.text}] if event.text else []
        return self._deltas(self._reader.add(event.text + self._use.marks.get(event.token_id, "")))

    def finish(self) -> list[dict[str, Any]]:
        """The last deltas: the answer is over."""
        return [] if self._reader is None else self._deltas(self._reader.finish())

    def reason(self, reason: str) -> str:
        """Why the answer ended, in OpenAI's words: a call that was named in the request is an ordinary end."""
        named = self._use is not None and self._use.named
        return "tool_calls" if self.calls and reason == "stop" and not named else reason

    def whole(self) -> dict[str, Any]:
        """The message."""
        content = self.text if self.text or not self.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        return {**message, "tool_calls": self.calls} if self.calls else message

    def _deltas(self, found: list[str | Call]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for item in found:
            if isinstance(item, str):
                self.text += item
                deltas.append({"content": item})
            elif self._use is not None and (self._use.several or not self.calls):
                function = {"name": item.name, "arguments": item.arguments}
                self.calls.append({"id": _new_id(), "type": "function", "function": function})
                deltas.append({"tool_calls": [{"index": len(self.calls) - 1, **self.calls[-1]}]})
        return deltas


def check_tools(asked: ChatRequest) -> None:
    """Refuse what contradicts itself.

    Raises:
        InvalidRequestError: It does, and where.
    """
    if not asked.tools:
        for param in ("tool_choice", "parallel_tool_calls"):
            if getattr(asked, param) is not None:
                raise InvalidRequestError(f"{param} is only for requests with tools.", param=param)
        return
    names = [tool.function.name for tool in asked.tools]
    if len(set(names)) < len(names):
        raise InvalidRequestError("Two of the tools have the same name.", param="tools")
    choice = asked.tool_choice
    if choice is not None and not isinstance(choice, str) and choice.function.name not in names:
        raise InvalidRequestError(
            f"tool_choice names {choice.function.name!r}, which is none of the tools.", param="tool_choice"
        )
    formed = asked.structured_outputs is not None or (
        asked.response_format is not None and asked.response_format.type != "text"
    )
    if formed and choice != "none":
        raise InvalidRequestError(
            "An answer of a given form leaves no room for calls of tools: leave out tools or the form, or say "
            'tool_choice: "none".',
            param="response_format" if asked.response_format is not None else "structured_outputs",
        )


def _new_id() -> str:
    # Nine letters or digits: Mistral's templates take no other ids when the conversation comes back.
    return "".join(secrets.choice(_LETTERS) for _ in range(9))
