"""Rows of conversations: messages, ShareGPT, Alpaca, prompts with completions, sources with targets, and plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorakit.errors import listing
from lorakit.models.conversation import Message
from lorakit.train.examples import Example
from lorakit.train.formats import Reading

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool", "tool": "tool", "function": "tool",
}  # fmt: skip


def messages(reading: Reading, learning: bool) -> list[Example]:
    """``{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}``, in OpenAI's form.

    An assistant's turn with ``"loss": false`` or ``"weight": 0`` is read but not learnt.
    """
    return _conversation(reading, reading.listed("messages"))


def sharegpt(reading: Reading, learning: bool) -> list[Example]:
    """``{"conversations": [{"from": "human", "value": ...}, ...]}``, with ``system`` and ``tools`` beside, perhaps."""
    turns = [_sharegpt_turn(reading, turn) for turn in reading.listed("conversations")]
    system = reading.optional_text("system")
    if system.strip():
        turns.insert(0, {"role": "system", "content": system})
    return _conversation(reading, turns)


def _sharegpt_turn(reading: Reading, turn: Any) -> Any:
    if not isinstance(turn, Mapping) or "role" in turn:
        return turn  # OpenAI's form under ShareGPT's name; whatever else is told by what reads it
    role = _SHAREGPT_ROLES.get(str(turn.get("from")))
    if role is None:
        raise reading.wrong(
            f"a turn is from {turn.get('from')!r}, which is none of {listing(_SHAREGPT_ROLES, most=20)}."
        )
    value = turn.get("value")
    rest = {key: turn[key] for key in ("loss", "weight") if key in turn}
    if turn.get("from") != "function_call":
        return {"role": role, "content": value, **rest}
    try:
        called = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise reading.wrong(f"a function call is not valid JSON ({error}).") from error
    return {
        "role": role,
        "content": "",
        "tool_calls": called if isinstance(called, list) else [called],
        **rest,
    }


def alpaca(reading: Reading, learning: bool) -> list[Example]:
    """``{"instruction": ..., "input": ..., "output": ...}``, with ``system`` and ``history`` beside, perhaps."""
    prompt = joined(reading.text("instruction"), reading.optional_text("input"))
    answer = reading.text("output").strip()
    before: list[Message] = []
    if reading.optional_text("system").strip():
        before.append({"role": "system", "content": reading.optional_text("system").strip()})
    for pair in reading.row.get("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            raise reading.wrong("'history' must be a list of pairs of texts: what was asked and answered.")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [_asked(reading, prompt, answer, before=before)]


def prompt_completion(reading: Reading, learning: bool) -> list[Example]:
    """``{"prompt": ..., "completion": ...}``: texts, or both lists of messages."""
    if isinstance(reading.value("prompt"), list):
        return _conversation(reading, [*reading.row["prompt"], *reading.listed("completion")], last_only=True)
    answer = reading.text("completion").strip()
    return [_asked(reading, reading.text("prompt"), answer)]


def seq2seq(reading: Reading, learning: bool) -> list[Example]:
    """``{"source": ..., "target": ...}``; ``target`` may be a list of texts, all of them right."""
    target = reading.value("target")
    if not isinstance(target, list):
        return [_asked(reading, reading.text("source"), reading.text("target").strip())]
    return _for_each(reading, learning, reading.text("source"), target, "target")


def generate(reading: Reading, learning: bool) -> list[Example]:
    """``{"instruction": ..., "input": ..., "references": [...]}``."""
    prompt = joined(reading.text("instruction"), reading.optional_text("input"))
    return _for_each(reading, learning, prompt, reading.row.get("references"), "references")


def text(reading: Reading, learning: bool) -> list[Example]:
    """``{"text": ...}``: learnt as it stands, with no template around it."""
    whole = reading.text("text")
    return [Example(reading.id, (), whole, (whole,), place=str(reading.place), divide=reading.data.divide)]


def joined(instruction: str, given: str) -> str:
    """An instruction and what it is about, which may be empty."""
    return "\n".join(part for part in (instruction.strip(), given.strip()) if part)


def _for_each(reading: Reading, learning: bool, prompt: str, references: Any, key: str) -> list[Example]:
    if not isinstance(references, list) or not references:
        raise reading.wrong(f"{key!r} must be a list of one or more texts.")
    if not all(isinstance(r, str) and r.strip() for r in references):
        raise reading.wrong(f"{key!r} holds something that is empty or no text.")
    every = tuple(r.strip() for r in references)
    answers = every if learning and reading.data.references == "all" else every[:1]
    asked = _asked(reading, prompt, every[0], references=every)
    if len(answers) == 1:
        return [asked]
    # The prompt is one object in all of them, which is how it is known to need rendering once.
    return [replace(asked, id=f"{asked.id}#{i}", answer=answer) for i, answer in enumerate(answers)]


def _asked(
    reading: Reading,
    prompt: str,
    answer: str,
    *,
    before: list[Message] | None = None,
    references: tuple[str, ...] = (),
) -> Example:
    turns = (*(before or ()), {"role": "user", "content": prompt})
    return Example(reading.id, turns, answer, references or (answer,), place=str(reading.place))


# ---- conversations of many turns
def _conversation(reading: Reading, raw: list[Any], *, last_only: bool = False) -> list[Example]:
    turns = reading.turns(raw)
    if turns[-1]["role"] != "assistant":
        raise reading.wrong("the last of the 'messages' must be the assistant's answer.")
    if len(turns) == 1 or turns[-2]["role"] == "assistant":
        raise reading.wrong("the assistant's answer must follow another's turn.")
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not all(turns[i]["content"] or turns[i].get("tool_calls") for i in answers):
        raise reading.wrong("an answer of the assistant is empty.")
    chosen = "last" if last_only else reading.data.learn
    asked = [_asked_to_learn(reading, turn) for turn in turns]
    if asked[0]:
        raise reading.wrong("the first turn cannot be learnt: there is no prompt before it.")
    # A greeting that opens a conversation is read and not learnt, as there is no prompt for it.
    wanted = [i for i in answers if i and (chosen != "last" or i == answers[-1])]
    learnt = tuple(i for i in answers if (i in wanted if asked[i] is None else asked[i]))
    if not learnt:
        raise reading.wrong("no answer is left to learn: all have 'loss': false.")
    clean = [{k: v for k, v in turn.items() if k not in ("loss", "weight")} for turn in turns]
    if chosen != "each":
        return [_example(reading, clean, learnt, reading.id, learn_all=chosen == "all")]
    rows = [i for i in learnt if i and clean[i - 1]["role"] != "assistant"]
    if len(rows) < len(learnt):
        raise reading.wrong("with data.learn: each, every answer that is learnt must follow another's turn.")
    return [_example(reading, clean[: i + 1], (i,), f"{reading.id}#{i}") for i in rows]


def _example(
    reading: Reading, turns: list[Message], learnt: tuple[int, ...], id: str, *, learn_all: bool = False
) -> Example:
    answer = turns[-1]
    return Example(
        id,
        tuple(turns[:-1]),
        answer["content"],
        (answer["content"],),
        learn_all=learn_all,
        place=str(reading.place),
        tools=reading.tools(),
        calls=tuple(answer.get("tool_calls", ())),
        learnt=learnt,
    )


def _asked_to_learn(reading: Reading, turn: Message) -> bool | None:
    """What the turn itself says about being learnt; None for nothing."""
    loss, weight = turn.get("loss"), turn.get("weight")
    if loss is None and weight is None:
        return None
    if loss is not None and not isinstance(loss, bool):
        raise reading.wrong(f"the 'loss' of a turn must be true or false; found {loss!r}.")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise reading.wrong(f"the 'weight' of a turn must be 0 or 1; found {weight!r}.")
    if loss is not None and weight is not None and loss != bool(weight):
        raise reading.wrong("a turn's 'loss' and 'weight' contradict each other: give one of them.")
    wanted = bool(weight) if loss is None else bool(loss)
    if wanted and turn["role"] != "assistant":
        raise reading.wrong(
            f"only the assistant's turns can be learnt, not one of the role {turn['role']!r}."
        )
    return wanted
