"""From a conversation to token ids, by the tokenizer's own chat template: the same for training, answering and serving.

Importing this module imports no transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError, DataError
from lorakit.models.encoding import encode_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""``{"role": ..., "content": ...}``, as chat templates take it; with ``tool_calls`` where tools are called."""

Tool = dict[str, Any]
"""What a model may call, as OpenAI and chat templates describe it (a JSON schema of a function)."""

ROLES = ("system", "developer", "user", "assistant", "tool")


class ConversationRenderer:
    """Renders conversations with a tokenizer's chat template, or plainly where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._special = sorted(special, key=len, reverse=True)
        self._shows_tools: bool | None = None

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids of a conversation, ready for the model to answer.

        Args:
            messages: The turns, see `normalised`.
            tools: What the model may call.

        Raises:
            DataError: The template refuses the conversation, or shows no tools.
        """
        return self.ids(self.prompt_text(messages, tools))

    def prompt_text(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The text of a conversation, ready for the model to answer; see `prompt`."""
        if tools:
            self._require_tools(messages, tools)
        return self._text(messages, tools, asked=True)

    def whole_text(self, turns: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The text of a conversation that nobody is asked to go on with; see `prompt`."""
        return self._text(turns, tools, asked=False)

    def answered_text(self, turns: Sequence[Message], name: str, tools: Sequence[Tool] = ()) -> str:
        """The text through the token that ends the last turn, which is the assistant's.

        What the template puts before the answer on its own account (an empty thought, say) is part of the answer: it
        is what the model has to write where it is asked.

        Args:
            turns: The conversation with its answer.
            name: What to call it in messages.
            tools: What the model may call.

        Raises:
            DataError: The template does not render the prompt as the beginning of the whole.
        """
        return self.answered_from(self.prompt_text(turns[:-1], tools), turns, name, tools)

    def answered_from(
        self, prompt: str, turns: Sequence[Message], name: str, tools: Sequence[Tool] = ()
    ) -> str:
        """`answered_text`, where the prompt is rendered already: `prompt_text` of all turns but the last."""
        answer = turns[-1]
        stop = str(self.tokenizer.eos_token or "")
        if not self.chat:
            return prompt + str(answer["content"]) + stop
        whole = self.whole_text(turns, tools)
        if not whole.startswith(prompt):
            raise _no_prefix(name, prompt, whole)
        body, rest = self._split(prompt, whole, turns, tools)
        if not body:
            raise DataError(
                f"The chat template leaves the answer of {name!r} out, so there is nothing to learn from it."
            )
        for token in self._special:
            if rest.startswith(token):
                return prompt + body + token
        return prompt + body + stop

    def ids(self, text: str) -> list[int]:
        """Token ids of a text that `prompt_text` or `answered_text` has made."""
        return self.all_ids([text])[0]

    def all_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """`ids` of each of some texts, which takes less time than one after the other."""
        # A template writes its special tokens itself; adding them again would double the first one.
        found = encode_ids(self.tokenizer, texts, special=not self.chat)
        if not self.chat:
            eos = self.tokenizer.eos_token_id
            for text, ids in zip(texts, found, strict=True):
                if ids and ids[-1] == eos and not text.endswith(str(self.tokenizer.eos_token)):
                    del ids[-1]  # some tokenizers end every text
        return found

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a text that is no conversation, between the tokens that begin and end texts."""
        return self.all_plain_ids([text])[0]

    def all_plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """`plain_ids` of each of some texts, which takes less time than one after the other."""
        eos = self.tokenizer.eos_token_id
        found = encode_ids(self.tokenizer, texts)
        return [ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos] for ids in found]

    def _split(
        self, prompt: str, whole: str, turns: Sequence[Message], tools: Sequence[Tool]
    ) -> tuple[str, str]:
        """What the last turn has beyond the prompt: the answer, and what the template writes after it.

        The border is found by rendering, never by a search: whatever follows the answer stays the same when the answer
        goes on.
        """
        written, answer = whole[len(prompt) :], turns[-1]
        text = answer.get("content") or ""
        if text and not answer.get("tool_calls"):
            if written.startswith(text):
                return text, written[len(text) :]
            longer = text + ("." if text[-1] != "." else "!")
            other = self.whole_text([*turns[:-1], {**answer, "content": longer}], tools)[len(prompt) :]
            after = same_beginning(written[::-1], other[::-1])
            return written[: len(written) - after], written[len(written) - after :]
        trimmed = written.rstrip()
        ending = next((token for token in self._special if trimmed.endswith(token)), "")
        return trimmed[: len(trimmed) - len(ending)], ending

    def _text(self, messages: Sequence[Message], tools: Sequence[Tool], *, asked: bool) -> str:
        if not self.chat:
            if tools or any("tool_calls" in turn or turn["role"] == "tool" for turn in messages):
                raise DataError("Tools need a chat template, and this tokenizer has none.")
            return "".join(f"{turn['content']}\n" for turn in messages)
        if not messages:
            raise DataError("There is nothing to answer: the conversation has no turns.")
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=asked
            )
        except TemplateSyntaxError as error:
            raise ConfigError(f"The chat template, line {error.lineno}: {error.message}") from error
        except (TemplateError, TypeError) as error:
            raise DataError(f"The chat template refuses this conversation: {error}") from error
        return str(text)

    def _require_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        if self._shows_tools is None and self.chat:
            shown, hidden = (self._text(messages, given, asked=True) for given in (tools, ()))
            self._shows_tools = shown != hidden
        if self._shows_tools is False:
            raise DataError(
                "There are tools, but the chat template does not show them to the model. Give it a template "
                "that does, or leave them out."
            )


def normalised(messages: Any) -> list[Message]:
    """Turns as chat templates take them, checked.

    Text parts (``[{"type": "text", "text": ...}]``) become one text, a missing content becomes empty, the arguments
    of tool calls become mappings, and a developer's turn is a system turn.

    Args:
        messages: A list of mappings with ``role`` and ``content``; an assistant's may have ``tool_calls``.

    Raises:
        DataError: It is something else.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError("'messages' must be a list of turns.")
    return [_turn(turn) for turn in messages]


def _turn(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError("each of the 'messages' must be an object with a 'role' and a text 'content'.")
    role = turn.get("role")
    if role not in ROLES:
        raise DataError(f"the role {role!r} is none of {', '.join(ROLES)}.")
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise DataError("'tool_calls' must be a list.")
    if calls and role != "assistant":
        raise DataError(f"only the assistant calls tools, not the role {role!r}.")
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(map(_part, content))
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise DataError("each of the 'messages' must be an object with a 'role' and a text 'content'.")
    kept = {key: value for key, value in turn.items() if key != "tool_calls" and value is not None}
    clean = {**kept, "role": "system" if role == "developer" else role, "content": content}
    return {**clean, "tool_calls": [_call(call) for call in calls]} if calls else clean


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(f"a part of a 'content' must be text; found {kind!r}.")
    return str(part["text"])


def _call(call: Any) -> dict[str, Any]:
    """A tool call; its arguments as a mapping, which templates write as JSON themselves."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError("a tool call must have a 'function' with a 'name'.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise DataError(
                f"the arguments of the call of {function['name']!r} are not valid JSON ({error})."
            ) from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise DataError(f"the arguments of the call of {function['name']!r} must be an object.")
    outside = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    return {
        "type": "function",
        **outside,
        "function": {"name": function["name"], "arguments": dict(arguments)},
    }


def same_beginning(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _no_prefix(name: str, prompt: str, whole: str) -> DataError:
    same = same_beginning(prompt, whole)
    return DataError(
        f"The chat template renders {name!r} with its answer in a way that does not begin with the prompt as "
        "rendered for generation, so training would not fit generation. Give the tokenizer a template that only "
        f"appends. They part after {prompt[max(0, same - 40) : same]!r}: the prompt goes on "
        f"{prompt[same : same + 40]!r}, the whole {whole[same : same + 40]!r}."
    )


def stop_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer in training.

    Raises:
        DataError: The chat template does not render a prompt as the beginning of the whole.
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    renderer = ConversationRenderer(tokenizer)
    return renderer.ids(renderer.answered_text(turns, "the chat template"))[-1]


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the one that training puts there, and those that the model's makers name.

    Args:
        model: The model; its ``generation_config`` names tokens, where it has one.
        tokenizer: Its tokenizer.
    """
    found: set[int | None] = {stop_id(tokenizer)}
    config = getattr(model, "generation_config", None)
    for named in (tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        found |= set(named) if isinstance(named, list) else {named}
    return sorted(token for token in found if token is not None)
