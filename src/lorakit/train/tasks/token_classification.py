"""Learning a label for each word: names in sentences, parts of speech."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import DataError, listing, near_matches
from lorakit.models.encoding import portions
from lorakit.train.classifier_scores import accuracy, label_scores, macro_f1
from lorakit.train.collate import Collator, PaddedCollator
from lorakit.train.columns import column_words
from lorakit.train.cutting import Overlong, check_cut
from lorakit.train.data import Split
from lorakit.train.entities import entity_scores
from lorakit.train.loss import Objective, count_labelled, without
from lorakit.train.progress import Progress
from lorakit.train.render import IGNORED
from lorakit.train.results import Answer, EvalResult
from lorakit.train.row_set import NamedSet, TokenRow
from lorakit.train.scoring import run_batches
from lorakit.train.sources import source_rows
from lorakit.train.split import source_of
from lorakit.train.task import telling
from lorakit.train.task_data import TaggedData
from lorakit.train.tasks.headed import HeadedTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaggedWords:
    """One row of a table.

    Attributes:
        place: File and line.
        words: As they stand in the text.
        tags: One for each word.
    """

    place: str
    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TaggedSet(NamedSet[TokenRow]):
    """All rows of a split, and what was done about long ones; a word's tag is the label of its first token."""

    @property
    def learnt(self) -> int:
        """Words of all rows."""
        return len(self._tags())

    def _tags(self) -> list[int]:
        return [label for row in self.rows for label in row.labels if label != IGNORED]

    @property
    def taught(self) -> str:
        """The share of each tag."""
        return f"{self.learnt:,} words with {len(self.names)} tags: {self.shares(self._tags())}"


def tag_losses(model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``-log p`` of the tag of each word of a batch, and the number of its row, both ``(words,)``."""
    learnt = batch["labels"] != IGNORED
    logits = model(**without(batch, "labels")).logits[learnt].float()
    return F.cross_entropy(logits, batch["labels"][learnt], reduction="none"), learnt.nonzero()[:, 0]


TAG = Objective.from_each(tag_losses, count_labelled, "word")


class TokenClassification(HeadedTask):
    """A head over every token, and the recipe's adapter on the body. A word's tag is read at its first token."""

    objective = TAG
    measures = ("valid_loss", "valid_accuracy")
    model_kind = "token-classification"
    peft_task = "TOKEN_CLS"

    def _words(self, split: Split) -> list[TaggedWords]:
        data = self.recipe.data
        assert isinstance(data, TaggedData)
        found = []
        for place, row in source_rows(source_of(data, split), data.format, data.max_rows.get(split)):
            words = column_words(row, data.tokens, "tokens", place)
            tags = column_words(row, data.tags, "tags", place)
            if len(words) != len(tags):
                raise DataError(
                    f"{place}: {len(words)} words in {data.tokens!r}, {len(tags)} tags in {data.tags!r}."
                )
            found.append(TaggedWords(str(place), tuple(words), tuple(tags)))
        return found

    def labels_of_data(self) -> tuple[str, ...]:
        return tag_names(self._words("train"))

    def rows(self, tokenizer: PreTrainedTokenizerBase, split: Split) -> TaggedSet:
        """Words with the numbers of their tags; the training split decides what tags there are."""
        texts = self._words(split)
        if split == "train":
            self.labels = tag_names(texts)
        overlong = self.recipe.train.overlong if split == "train" else "truncate"
        return self._set(texts, tokenizer, overlong)

    def _set(self, texts: Sequence[TaggedWords], tokenizer: Any, overlong: Overlong) -> TaggedSet:
        return tag_rows(
            texts, self.labels, tokenizer, max_length=self.recipe.train.max_length, overlong=overlong
        )

    def collator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, str | None]:
        """Padded on the right."""
        return PaddedCollator(int(tokenizer.pad_token_id)), None

    def measure(self, model: PreTrainedModel, rows: Sequence[TokenRow], collator: Any) -> dict[str, float]:
        """The loss, and the share of right tags."""
        losses, found = self._run(model, rows, collator)
        gold = [label for row in rows for label in row.labels if label != IGNORED]
        right = sum(tag == label for tag, label in zip((t for row in found for t in row), gold, strict=True))
        return {"valid_loss": losses, "valid_accuracy": right / len(gold)}

    def _run(
        self, model: PreTrainedModel, rows: Sequence[TokenRow], collator: Collator, told: Any = None
    ) -> tuple[float, list[list[int]]]:
        """The mean loss, and for each row the likeliest tag of each word that was read."""
        total, words = 0.0, 0
        found: dict[int, list[int]] = {}

        def step(numbers: list[int], batch: Mapping[str, Tensor]) -> None:
            nonlocal total, words
            learnt = batch["labels"] != IGNORED
            logits = model(**without(batch, "labels")).logits.float()
            total += F.cross_entropy(logits[learnt], batch["labels"][learnt], reduction="sum").item()
            words += int(learnt.sum())
            best = logits.argmax(dim=2)
            for i, row in enumerate(numbers):
                found[row] = best[i][learnt[i]].tolist()

        run_batches(model, rows, collator, self.recipe.train, step, told)
        return total / words, [found[i] for i in range(len(rows))]

    def examples(self, split: Split, limit: int | None) -> list[TaggedWords]:
        """Words with the tags that they have."""
        return self._words(split)[:limit]

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[TaggedWords],
        progress: Progress,
        title: str,
    ) -> EvalResult:
        """``accuracy`` and ``macro_f1`` of words, ``loss`` a word; ``entity_f1`` where tags begin with ``B-``, ``I-``.

        The words of a row that is cut at ``train.max_length`` count as missed behind the cut.
        """
        from lorakit.models import labels_of

        self.labels = labels_of(model)
        rows = self._set(
            examples, tokenizer, "error" if self.recipe.train.overlong == "error" else "truncate"
        )
        collator = PaddedCollator(int(tokenizer.pad_token_id))
        loss, found = self._run(model, rows.rows, collator, telling(progress, "tagging"))
        number = {name: i for i, name in enumerate(self.labels)}
        # A word that was cut off has no tag: it is given one that no word has.
        given = [[*tags, *[-1] * (len(e.words) - len(tags))] for tags, e in zip(found, examples, strict=True)]
        gold = [[number[tag] for tag in example.tags] for example in examples]
        fared = label_scores([t for row in given for t in row], [t for row in gold for t in row], self.labels)
        every = {"accuracy": accuracy(fared), "macro_f1": macro_f1(fared), "loss": loss}
        words = [[self.labels[t] if t >= 0 else "O" for t in row] for row in given]
        if all(tag == "O" or tag[:2] in ("B-", "I-") for tag in self.labels):
            every["entity_f1"] = entity_scores(words, [list(e.tags) for e in examples]).f1
        asked = self.recipe.evaluate.metrics or every
        missing = [metric for metric in asked if metric not in every]
        if missing:
            raise DataError(
                f"{missing[0]} needs tags that begin with B- and I- (and O for none); these are {listing(self.labels)}."
            )
        answers = tuple(
            Answer(e.place, " ".join(e.words), " ".join(tags), (" ".join(e.tags),), tags == list(e.tags))
            for e, tags in zip(examples, words, strict=True)
        )
        return EvalResult({m: every[m] for m in asked}, len(examples), 0.0, answers, fared)


def tag_names(texts: Sequence[TaggedWords]) -> tuple[str, ...]:
    """The tags that occur, by the alphabet, and ``O`` first.

    Raises:
        DataError: There is only one.
    """
    names = {tag for text in texts for tag in text.tags}
    if len(names) < 2:
        raise DataError(f"All words to train on have the tag {min(names)!r}: there is nothing to tell apart.")
    return tuple(sorted(names, key=lambda name: (name != "O", name)))


def tag_rows(
    texts: Sequence[TaggedWords],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: Overlong,
) -> TaggedSet:
    """Rows of token ids with the number of each word's tag at its first token.

    Args:
        texts: At least one.
        names: The tags in the order of the logits.
        tokenizer: The model's; it must be a fast one, which knows what word a token belongs to.
        max_length: Most tokens of a row; never more than the tokenizer says its model reads.
        overlong: What to do with a longer one.

    Raises:
        DataError: A tag is not among ``names``, a word has no tokens, a row is too long, or none is left.
    """
    number = {name: i for i, name in enumerate(names)}
    most = min(max_length, tokenizer.model_max_length)
    rows, cut, longest = [], [], 0
    for text, encoded in _encoded(texts, tokenizer):
        for tag in text.tags:
            if tag not in number:
                raise DataError(
                    f"{text.place}: the tag {tag!r} is none of those of the training data.{near_matches(tag, names)} "
                    f"Those are: {listing(names, most=20)}."
                )
        longest = max(longest, len(encoded.ids))
        _check_words(text, encoded.words)
        if len(encoded.ids) > most:
            cut.append(text.place)
            if overlong == "drop":
                continue
            shorter: Any = tokenizer(
                list(text.words), is_split_into_words=True, truncation=True, max_length=most
            )
            encoded = _Encoded(shorter["input_ids"], shorter.word_ids())
        labels = [
            IGNORED if word is None else number[text.tags[word]] for word in _first_tokens(encoded.words)
        ]
        rows.append(TokenRow(text.place, tuple(encoded.ids), tuple(labels)))
    truncated, dropped = check_cut(cut, len(rows), len(texts), longest, most, overlong)
    return TaggedSet(
        rows=tuple(rows), names=tuple(names), longest=longest, truncated=truncated, dropped=dropped
    )


class _Encoded(NamedTuple):
    """Token ids, and for each token the number of its word; None for those that the tokenizer adds."""

    ids: list[int]
    words: list[int | None]


def _encoded(
    texts: Sequence[TaggedWords], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[TaggedWords, _Encoded]]:
    """Each text with its tokens; many are read in one call."""
    for some in portions(texts, [sum(map(len, text.words)) for text in texts]):
        encoded: Any = tokenizer([list(text.words) for text in some], is_split_into_words=True, verbose=False)
        for i, text in enumerate(some):
            yield text, _Encoded(encoded["input_ids"][i], encoded.word_ids(i))


def _first_tokens(words: Sequence[int | None]) -> Iterator[int | None]:
    """For each token the word that begins there, or None."""
    before = None
    for word in words:
        yield word if word != before else None
        before = word


def _check_words(text: TaggedWords, words: Sequence[int | None]) -> None:
    read = {word for word in words if word is not None}
    for i, word in enumerate(text.words):
        if i not in read:
            raise DataError(f"{text.place}: the tokenizer makes no token of the word {word!r}: leave it out.")
