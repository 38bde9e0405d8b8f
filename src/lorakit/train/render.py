"""From a conversation to token ids, the same way for training and for generation.

The text is rendered once and by the tokenizer's own chat template. What is learnt is found by position: the prompt,
rendered as for generation, must be a prefix of the whole, token by token, and everything after it up to and including
the token that ends the turn is labelled. Nothing is searched for among the ids, and a pad token that is also the stop
token stays labelled where it stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorakit.errors import DataError, listing
from lorakit.train.examples import Example, Message
from lorakit.train.row_set import RowSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not learnt."""


@dataclass(frozen=True)
class Rendered:
    """One row as the model sees it.

    Attributes:
        id: The example's.
        ids: Token ids.
        labels: For each token its id where it is learnt, else -100; the first is never learnt.
    """

    id: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def learnt(self) -> int:
        """How many tokens are learnt."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, kw_only=True)
class RenderedSet(RowSet[Rendered]):
    """All rows of a split, and what was done about long ones."""

    @property
    def learnt(self) -> int:
        """Learnt tokens of all rows."""
        return sum(row.learnt for row in self.rows)

    @property
    def taught(self) -> str:
        """The share of the tokens that is learnt."""
        return f"{100 * self.learnt / self.tokens:.0f} % learnt"


class Renderer:
    """Renders conversations with a tokenizer's chat template, or plainly where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._special = sorted(special, key=len, reverse=True)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the model to answer."""
        return self._ids(self._prompt_text(messages))

    def row(self, example: Example) -> Rendered:
        """Token ids and labels of a conversation with its answer.

        Raises:
            DataError: The template does not render a prompt as the beginning of the whole, or nothing is learnt.
        """
        turns = [*example.messages, {"role": "assistant", "content": example.answer}]
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        ids = self._ids(self._answered(turns, example))
        labels = [IGNORED] * len(ids)
        for i in answers if example.learn_all else answers[-1:]:
            start = self._check_prefix(self._prompt_text(turns[:i]), ids, example)
            end = self._check_prefix(self._answered(turns[: i + 1], example), ids, example)
            labels[start:end] = ids[start:end]
        labels[0] = IGNORED
        row = Rendered(example.id, tuple(ids), tuple(labels))
        if not row.learnt:
            raise DataError(f"Nothing of {example.id!r} would be learnt: its answer has no tokens.")
        return row

    def _prompt_text(self, messages: Sequence[Message]) -> str:
        if self.chat:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
            return str(text)
        return "".join(f"{turn['content']}\n" for turn in messages)

    def _answered(self, turns: Sequence[Message], example: Example) -> str:
        """The text through the token that ends the last turn, which is the assistant's."""
        prompt, answer = self._prompt_text(turns[:-1]), turns[-1]["content"]
        stop = str(self.tokenizer.eos_token or "")
        if not self.chat:
            return prompt + answer + stop
        whole = str(self.tokenizer.apply_chat_template(list(turns), tokenize=False))
        if not whole.startswith(prompt + answer):
            raise DataError(
                f"The chat template renders {example.id!r} with its answer in a way that does not begin "
                "with the prompt as "
                "rendered for generation, so training would not fit generation. Give the tokenizer a "
                "template that only "
                f"appends. The prompt ends in {prompt[-40:]!r}; the whole goes on "
                f"{whole[len(prompt) - 40 : len(prompt) + 40]!r}."
            )
        rest = whole[len(prompt + answer) :]
        for token in self._special:
            if rest.startswith(token):
                return prompt + answer + token
        return prompt + answer + stop

    def _check_prefix(self, text: str, ids: Sequence[int], example: Example) -> int:
        """The number of tokens of a text that must be the beginning of the whole."""
        part = self._ids(text)
        if part != list(ids[: len(part)]):
            at = next(i for i, (a, b) in enumerate(zip([*part, -1], [*ids, -2], strict=False)) if a != b)
            raise DataError(
                f"The tokens of {example.id!r} change where the answer begins or ends: the prompt's token {at} is "
                f"{self.tokenizer.decode(part[at : at + 1])!r} alone, but "
                f"{self.tokenizer.decode(list(ids[at : at + 1]))!r} in the whole. "
                "The model would be trained on another prompt than it is asked with. Let the answer begin "
                "with a visible "
                "character, or change the template so that a special token stands between."
            )
        return len(part)

    def _ids(self, text: str) -> list[int]:
        # A template writes its special tokens itself; adding them again would double the first one.
        ids = list(self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if not self.chat and ids and ids[-1] == eos and not text.endswith(str(self.tokenizer.eos_token)):
            del ids[-1]  # some tokenizers end every text
        return ids


def stop_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer in training."""
    asked = Example("the chat template", ({"role": "user", "content": "a"},), "b")
    return Renderer(tokenizer).row(asked).ids[-1]


def render(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: Literal["drop", "truncate", "error"] = "drop",
) -> RenderedSet:
    """All rows of a split.

    Args:
        examples: At least one.
        tokenizer: The model's.
        max_length: Most tokens of a row.
        overlong: What to do with a longer one: leave it out, cut its end off, or stop.

    Raises:
        DataError: A row cannot be rendered, or nothing is left to learn.
    """
    renderer = Renderer(tokenizer)
    rows, longest, cut, empty = [], 0, [], []
    for example in examples:
        row = renderer.row(example)
        longest = max(longest, len(row.ids))
        if len(row.ids) > max_length:
            cut.append(row.id)
            if overlong == "drop":
                continue
            row = Rendered(row.id, row.ids[:max_length], row.labels[:max_length])
            if not row.learnt:
                empty.append(row.id)
        rows.append(row)
    advice = f"The longest row has {longest} tokens; train.max_length is {max_length}."
    if cut and overlong == "error":
        raise DataError(f"{len(cut)} rows are longer than train.max_length: {listing(cut, most=4)}. {advice}")
    if empty:
        raise DataError(
            f"Cut to train.max_length, {len(empty)} rows have nothing left to learn: "
            f"{listing(empty, most=4)}. {advice} "
            "Raise it, or set train.overlong: drop."
        )
    if not rows:
        raise DataError(f"No row is left to learn: all {len(examples)} are too long. {advice}")
    return RenderedSet(
        rows=tuple(rows),
        longest=longest,
        truncated=len(cut) if overlong == "truncate" else 0,
        dropped=len(cut) if overlong == "drop" else 0,
    )
