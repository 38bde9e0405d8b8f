"""Rows that are pairs: two answers to one prompt, of which one is better; and sources with their targets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from lorakit.errors import DataError
from lorakit.models.conversation import Message, Tool
from lorakit.train.data import load_examples
from lorakit.train.data_sections import DataSection, FileData
from lorakit.train.examples import Example
from lorakit.train.formats import Reading, readings
from lorakit.train.split import Split


@dataclass(frozen=True)
class Preference:
    """A prompt with a better and a worse answer.

    Attributes:
        id: Names it in messages.
        place: File and line.
        messages: The prompt; ends with a turn that is not the assistant's.
        chosen: The better answer.
        rejected: The worse one.
        tools: What the model may call.
    """

    id: str
    place: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    tools: tuple[Tool, ...] = ()

    @property
    def examples(self) -> tuple[Example, Example]:
        """The conversation with the chosen answer, and with the rejected one, for `lorakit.train.Renderer`."""
        chosen = Example(
            self.id, self.messages, self.chosen, (self.chosen,), place=self.place, tools=self.tools
        )
        return chosen, replace(chosen, answer=self.rejected, references=(self.rejected,))


@dataclass(frozen=True)
class TextPair:
    """A text to read and a text to write.

    Attributes:
        id: Names it in messages.
        place: File and line.
        source: What is read.
        target: What is to be written.
        references: All texts that are right, for scoring.
    """

    id: str
    place: str
    source: str
    target: str
    references: tuple[str, ...]


def load_preferences(data: DataSection, split: Split) -> list[Preference]:
    """The rows of a split of chosen and rejected answers.

    Three forms are read: ``prompt``, ``chosen``, ``rejected`` as texts; the prompt as a list of messages and the
    answers as texts or as lists of the assistant's one message; and no prompt but two conversations that differ in
    their last message.

    Raises:
        DataError: A file is missing or malformed, or a row is wrong; the message names the line.
        ConfigError: The recipe names no such split.
    """
    if not isinstance(data, FileData):
        raise DataError(
            "Preference data are read from files: set data.train to one with chosen and rejected."
        )
    found = []
    for reading in readings(data, split):
        if reading.format != "preference":
            raise reading.wrong(
                f"rows of the format {reading.format} have no 'chosen' and 'rejected', which task: dpo learns from."
            )
        found.append(_preference(reading))
    return found


def load_pairs(data: DataSection, split: Split, *, learning: bool = False) -> list[TextPair]:
    """The rows of a split as sources and targets, from any format with one prompt and one answer.

    Args:
        data: The recipe's section.
        split: Which part.
        learning: As for `load_examples`.

    Raises:
        DataError: A file is missing or malformed, or a row is a longer conversation or a plain text.
        ConfigError: The recipe names no such split.
    """
    return [_pair(example) for example in load_examples(data, split, learning=learning)]


def _pair(example: Example) -> TextPair:
    roles = [turn["role"] for turn in example.messages]
    if roles not in (["user"], ["system", "user"]) or example.calls:
        raise DataError(
            f"{example.where}: an encoder-decoder reads one text and writes one; this row is "
            f"{'a plain text' if not roles else 'a conversation of several turns, or calls tools'}."
        )
    source = "\n".join(turn["content"] for turn in example.messages)
    place = example.place or example.id
    return TextPair(example.id, place, source, example.answer, example.references)


def _preference(reading: Reading) -> Preference:
    prompt = reading.row.get("prompt")
    before = [] if prompt is None else _prompt(reading, prompt)
    shared, chosen, rejected = _answers(reading, before)
    if not shared or shared[-1]["role"] == "assistant":
        raise reading.wrong(
            "there is no prompt: give 'prompt', or 'chosen' and 'rejected' as conversations that begin alike."
        )
    if chosen == rejected:
        raise reading.wrong("'chosen' and 'rejected' are the same answer.")
    if reading.data.system is not None and shared[0]["role"] != "system":
        shared = [{"role": "system", "content": reading.data.system}, *shared]
    return Preference(reading.id, str(reading.place), tuple(shared), chosen, rejected, reading.tools())


def _prompt(reading: Reading, prompt: Any) -> list[Message]:
    if isinstance(prompt, list):
        return reading.turns(prompt)
    return [{"role": "user", "content": reading.text("prompt")}]


def _answers(reading: Reading, before: list[Message]) -> tuple[list[Message], str, str]:
    """The prompt's turns, and the two answers."""
    chosen, rejected = reading.value("chosen"), reading.value("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return before, reading.text("chosen").strip(), reading.text("rejected").strip()
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise reading.wrong("'chosen' and 'rejected' must both be texts, or both lists of messages.")
    better, worse = reading.turns(chosen), reading.turns(rejected)
    for key, turns in (("chosen", better), ("rejected", worse)):
        last = turns[-1]
        if last["role"] != "assistant" or not last["content"] or last.get("tool_calls"):
            raise reading.wrong(f"{key!r} must end with an answer of the assistant, which is a text.")
    shared = better[:-1]
    if shared != worse[:-1]:
        raise reading.wrong("'chosen' and 'rejected' must begin alike and differ in their last message only.")
    if before and shared[-len(before) :] != before and _contents(shared) != _contents(before):
        shared = [*before, *shared]  # the answers alone beside the prompt
        if len(better) > 1:
            raise reading.wrong("'prompt' and the beginning of 'chosen' are different conversations.")
    return shared, better[-1]["content"], worse[-1]["content"]


def _contents(turns: Iterable[Message]) -> list[str]:
    return [turn["content"].strip() for turn in turns if turn["role"] != "system"]
