"""From a conversation to token ids, the same way for training and for generation.

The text is rendered once and by the tokenizer's own chat template. What is learnt is found by position: the prompt,
rendered as for generation, must be a prefix of the whole, token by token, and everything after it up to and including
the token that ends the turn is labelled. Nothing is searched for among the ids, and a pad token that is also the stop
token stays labelled where it stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import is_
from typing import TYPE_CHECKING

from lorakit.errors import DataError, listing
from lorakit.models.conversation import ConversationRenderer
from lorakit.train.cutting import Overlong
from lorakit.train.examples import Example
from lorakit.train.row_set import RowSet, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not learnt."""

_AT_ONCE = 1024  # rows that are rendered together


@dataclass(frozen=True)
class Rendered(TokenRow):
    """A conversation or a text as the model sees it; a token's label is its id, and the first is never learnt.

    Attributes:
        example: What it was rendered from, for people who look at the row.
    """

    example: Example | None = field(default=None, compare=False, repr=False)

    @property
    def learnt(self) -> int:
        """How many tokens are learnt."""
        return len(self.labels) - self.labels.count(IGNORED)

    @property
    def learnt_at(self) -> set[int]:
        """The places of the tokens that are learnt."""
        return {place for place, label in enumerate(self.labels) if label != IGNORED}


@dataclass(frozen=True, kw_only=True)
class RenderedSet(RowSet[Rendered]):
    """All rows of a split, and what was done about long ones.

    Attributes:
        lost: Tokens that are not read because their rows were cut or left out.
        divided: Texts that were divided into several rows.
    """

    lost: int = 0
    divided: int = 0

    @property
    def learnt(self) -> int:
        """Learnt tokens of all rows."""
        return sum(row.learnt for row in self.rows)

    @property
    def taught(self) -> str:
        """The share of the tokens that is learnt."""
        share = f"{100 * self.learnt / self.tokens:.0f} % learnt"
        return f"{share}; {self.divided} longer texts divided" if self.divided else share


@dataclass(frozen=True)
class _Texts:
    """The texts of a conversation that must be tokenized.

    Attributes:
        example: The conversation.
        whole: All of it, through the token that ends its last learnt answer.
        prompts: For each learnt turn what comes before it.
        ends: For each but the last of them the text through its end.
    """

    example: Example
    whole: str
    prompts: Mapping[int, str]
    ends: Mapping[int, str]

    @property
    def every(self) -> Iterator[str]:
        """All of them."""
        yield self.whole
        yield from self.prompts.values()
        yield from self.ends.values()

    def has_prompt_of(self, example: Example, turn: int) -> bool:
        """Whether what comes before a turn is, object by object, what came before the same turn here."""
        own, other = self.example.messages[:turn], example.messages[:turn]
        same = len(own) == len(other) == turn and all(map(is_, own, other))
        return same and turn in self.prompts and self.example.tools is example.tools


class Renderer(ConversationRenderer):
    """Renders conversations with their answers, labelled by what is learnt."""

    def row(self, example: Example) -> Rendered:
        """Token ids and labels of a conversation with its answer, or of a plain text.

        Raises:
            DataError: The template does not render a prompt as the beginning of the whole, nothing is learnt, an
                answer ends without a token that stops, or the token that begins texts stands there twice.
        """
        try:
            return self._rows([example])[0]
        except DataError as error:
            if not example.place:
                raise
            raise DataError(f"{example.place}: {error}") from error

    def rows(self, examples: Sequence[Example]) -> Iterator[Rendered]:
        """The `row` of each example, in less time: many are tokenized in one call, and no prompt is rendered twice.

        Raises:
            DataError: As `row` does, about the first example that is wrong.
        """
        for start in range(0, len(examples), _AT_ONCE):
            some = examples[start : start + _AT_ONCE]
            try:
                found = self._rows(some)
            except DataError:
                found = [self.row(example) for example in some]  # which tells the first one that is wrong
            yield from found

    def _rows(self, examples: Sequence[Example]) -> list[Rendered]:
        texts: list[_Texts | None] = []
        for example in examples:
            texts.append(self._texts(example, texts[-1] if texts else None))
        every = list(dict.fromkeys(text for each in texts if each is not None for text in each.every))
        ids = dict(zip(every, self.all_ids(every), strict=True))
        plain = iter(self.all_plain_ids([example.answer for example in examples if not example.messages]))
        rows = []
        for example, each in zip(examples, texts, strict=True):
            if not example.messages:
                whole = next(plain)
                row = Rendered(example.id, tuple(whole), (IGNORED, *whole[1:]), example)
            elif each is None:
                row = Rendered(example.id, (), (), example)
            else:
                row = self._labelled(example, each, ids)
            self._check_beginning(row.ids)
            if not row.learnt:
                raise DataError(
                    f"Nothing of {example.id!r} would be learnt: it has no answer, or its answer has no tokens."
                )
            rows.append(row)
        return rows

    def _texts(self, example: Example, before: _Texts | None) -> _Texts | None:
        """What of a conversation is to be tokenized; None for a plain text, and where nothing is learnt.

        Args:
            example: The conversation.
            before: The texts of another, whose prompt is taken where it is the same object.
        """
        learnt = example.learnt_turns if example.messages else ()
        if not learnt:
            return None
        last, tools = max(learnt), example.tools
        turns = example.turns[: last + 1]
        if before is not None and before.has_prompt_of(example, last):
            prompt = before.prompts[last]
        else:
            prompt = self.prompt_text(turns[:last], tools)
        whole = self.answered_from(prompt, turns, example.id, tools)
        prompts, ends = {last: prompt}, {}
        for i in learnt:
            if i != last:
                prompts[i] = self.prompt_text(turns[:i], tools)
                ends[i] = self.answered_from(prompts[i], turns[: i + 1], example.id, tools)
        return _Texts(example, whole, prompts, ends)

    def _labelled(self, example: Example, texts: _Texts, tokens: Mapping[str, list[int]]) -> Rendered:
        ids = tokens[texts.whole]
        labels = [IGNORED] * len(ids)
        for i in example.learnt_turns:
            start = self._check_prefix(tokens[texts.prompts[i]], ids, example)
            end = len(ids)
            if i in texts.ends:
                end = self._check_prefix(tokens[texts.ends[i]], ids, example)
            self._check_stop(ids[start:end], example)
            labels[start:end] = ids[start:end]
        labels[0] = IGNORED
        return Rendered(example.id, tuple(ids), tuple(labels), example)

    def _check_prefix(self, part: list[int], ids: list[int], example: Example) -> int:
        """The number of tokens of a part that must be the beginning of the whole."""
        if part != ids[: len(part)]:
            at = next(i for i, (a, b) in enumerate(zip([*part, -1], [*ids, -2], strict=False)) if a != b)
            raise DataError(
                f"The tokens of {example.id!r} change where the answer begins or ends: the prompt's token {at} is "
                f"{self.tokenizer.decode(part[at : at + 1])!r} alone, but "
                f"{self.tokenizer.decode(ids[at : at + 1])!r} in the whole. "
                "The model would be trained on another prompt than it is asked with. Let the answer begin "
                "with a visible character, or change the template so that a special token stands between. If the "
                "template rewrites earlier answers, set data.learn to last, or to each."
            )
        return len(part)

    def _check_stop(self, answer: Sequence[int], example: Example) -> None:
        """The last token that is learnt must be one that ends answers, or the model learns to go on for ever."""
        if answer and answer[-1] not in self._special_ids:
            raise DataError(
                f"The answer of {example.id!r} ends in {self.tokenizer.decode([answer[-1]])!r} and not in a token "
                "that stops, so the model would not learn to stop: the chat template writes none, and the tokenizer "
                "has no end token (eos_token). Set one in tokenizer_config.json, or change the template."
            )

    def _check_beginning(self, ids: Sequence[int]) -> None:
        """The token that begins texts must not stand there twice: no model was pretrained on that."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise DataError(
                f"The row begins with {self.tokenizer.bos_token!r} twice: once from the chat template or the "
                "tokenizer, and once more from the template or the text. Remove one of them."
            )

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset({*self.tokenizer.all_special_ids, *added})


def render(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: Overlong = "drop",
) -> RenderedSet:
    """All rows of a split.

    Args:
        examples: At least one.
        tokenizer: The model's.
        max_length: Most tokens of a row.
        overlong: What to do with a longer one: leave it out, cut its end off, or stop. Texts that may be divided
            become several rows.

    Raises:
        DataError: A row cannot be rendered, or nothing is left to learn.
    """
    renderer = Renderer(tokenizer)
    rows: list[Rendered] = []
    longest = lost = divided = 0
    cut: list[str] = []
    empty: list[str] = []
    for example, row in zip(examples, renderer.rows(examples), strict=True):
        length = len(row.ids)
        longest = max(longest, length)
        if length <= max_length:
            rows.append(row)
        elif example.divide:
            divided += 1
            rows += _divided(row, max_length)
        else:
            cut.append(example.place or row.id)
            lost += length - (max_length if overlong == "truncate" else 0)
            if overlong == "truncate":
                rows.append(replace(row, ids=row.ids[:max_length], labels=row.labels[:max_length]))
                if not rows[-1].learnt:
                    empty.append(cut[-1])
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
        lost=lost,
        divided=divided,
    )


def _divided(row: Rendered, length: int) -> list[Rendered]:
    """A long text in pieces; a piece of one token, of which nothing could be learnt, is left out."""
    pieces = []
    for number, start in enumerate(range(0, len(row.ids) - 1, length)):
        ids = row.ids[start : start + length]
        pieces.append(replace(row, id=f"{row.id}#{number}", ids=ids, labels=(IGNORED, *ids[1:])))
    return pieces
