"""From a recipe's data section to examples: the built-in task, and rows of files in any of the formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lorakit.errors import ConfigError
from lorakit.models.conversation import Message
from lorakit.tasks import text_to_sql
from lorakit.train import conversations
from lorakit.train.data_sections import BuiltinData, DataSection, FileData
from lorakit.train.examples import Example
from lorakit.train.formats import Reading, readings
from lorakit.train.split import Split, has_split
from lorakit.train.text2sql_rows import compact_schema, text2sql

__all__ = ["Split", "compact_schema", "has_split", "load_examples"]

_READERS: dict[str, Callable[[Reading, bool], list[Example]]] = {
    "messages": conversations.messages,
    "sharegpt": conversations.sharegpt,
    "alpaca": conversations.alpaca,
    "prompt_completion": conversations.prompt_completion,
    "seq2seq": conversations.seq2seq,
    "text": conversations.text,
    "generate": conversations.generate,
    "text2sql": text2sql,
}


def load_examples(data: DataSection, split: Split, *, learning: bool = False) -> list[Example]:
    """The examples of a split.

    Args:
        data: The recipe's section.
        split: Which part.
        learning: Whether they are to be learnt: then a row with several references gives an example for each (see
            ``data.references``); to score, it is one example.

    Raises:
        DataError: A file is missing, empty or malformed; the message names the line.
        ConfigError: The recipe names no such split.
    """
    if isinstance(data, BuiltinData):
        return _builtin(data, split)
    assert isinstance(data, FileData)
    examples = [example for reading in readings(data, split) for example in _read(reading, learning)]
    if data.system is None:
        return examples
    system: Message = {"role": "system", "content": data.system}
    return [_with_system(example, system) for example in examples]


def _read(reading: Reading, learning: bool) -> list[Example]:
    if reading.format == "preference":
        raise reading.wrong(
            "chosen and rejected answers are for task: dpo. To learn the chosen ones alone, set data.format: "
            "prompt_completion and data.columns: {prompt: prompt, completion: chosen}."
        )
    return _READERS[reading.format](reading, learning)


def _builtin(data: BuiltinData, split: Split) -> list[Example]:
    count = getattr(data, split)
    if not count:
        raise ConfigError(
            f"The recipe asks for no examples of the {split} split: set data.{split} to a number."
        )
    return [
        Example(
            e.id, tuple(text_to_sql.messages(e)), text_to_sql.answer(e), (text_to_sql.answer(e),), case=e.case
        )
        for e in text_to_sql.generate(split, count, data.seed)
    ]


def _with_system(example: Example, system: Message) -> Example:
    if not example.messages or example.messages[0]["role"] == "system":
        return example
    learnt = None if example.learnt is None else tuple(i + 1 for i in example.learnt)
    return replace(example, messages=(system, *example.messages), learnt=learnt)
