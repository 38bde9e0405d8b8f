"""Texts with labels, from a recipe's tables to the rows that a classifier is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError, listing, near_matches
from lorakit.train.columns import column_text, column_value
from lorakit.train.cutting import Overlong, PlainText, cut_texts
from lorakit.train.data_sections import LabelledData
from lorakit.train.row_set import NamedSet, TokenRow
from lorakit.train.sources import source_rows
from lorakit.train.split import Split, source_of
from lorakit.train.tables import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LabelledText(PlainText):
    """One row of a table.

    Attributes:
        label: Its name; a whole number as its digits.
    """

    label: str


@dataclass(frozen=True)
class LabelledRow(TokenRow):
    """One row as the model sees it, with its label alone: the number of a name, or what a regression learns.

    Attributes:
        types: For each token which text it belongs to, where the model wants to know.
    """

    types: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class LabelledSet(NamedSet[LabelledRow]):
    """All rows of a split, and what was done about long ones."""

    @property
    def taught(self) -> str:
        """The share of each label."""
        return f"{len(self.names)} labels: {self.shares(row.labels[0] for row in self.rows)}"


def table_texts(data: LabelledData, split: Split) -> Iterator[tuple[PlainText, Row]]:
    """The texts of a split, each with the row that it stands in.

    Raises:
        DataError: A file is missing or malformed, or a row has no text; the message names the line.
        ConfigError: The recipe names no such split.
    """
    for row in source_rows(source_of(data, split), data.format, data.max_rows.get(split)):
        place, values = row
        text = column_text(values, data.text, "text", place)
        second = (
            None if data.second_text is None else column_text(values, data.second_text, "second_text", place)
        )
        yield PlainText(str(place), text, second), row


def load_texts(data: LabelledData, split: Split) -> list[LabelledText]:
    """The rows of a split.

    Raises:
        DataError: A file is missing or malformed, or a row has no text or no label; the message names the line.
        ConfigError: The recipe names no such split.
    """
    return [
        LabelledText(text.place, text.text, text.second, _label(row, data.label, text.place))
        for text, (_, row) in table_texts(data, split)
    ]


def label_names(texts: Sequence[LabelledText]) -> tuple[str, ...]:
    """The labels that occur: whole numbers by size, words by the alphabet.

    Raises:
        DataError: There is only one.
    """
    names = {text.label for text in texts}
    if len(names) < 2:
        raise DataError(
            f"All {len(texts)} rows to train on have the label {min(names)!r}: there is nothing to tell apart."
        )
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=int if numbers else str))


def tokenize(
    texts: Sequence[LabelledText],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: Overlong = "truncate",
) -> LabelledSet:
    """Rows of token ids.

    Args:
        texts: At least one.
        names: The labels in the order of the logits.
        tokenizer: The model's.
        max_length: Most tokens of a row; never more than the tokenizer says its model reads.
        overlong: What to do with a longer one: leave it out, cut the end of its (longer) text off, or stop.

    Raises:
        DataError: A label is not among ``names``, a row is too long, or none is left.
    """
    number = {name: i for i, name in enumerate(names)}
    for text in texts:
        if text.label not in number:
            raise DataError(
                f"{text.place}: the label {text.label!r} is none of those of the training data."
                f"{near_matches(text.label, names)} Those are: {listing(names, most=20)}."
            )
    cut = cut_texts(texts, tokenizer, max_length=max_length, overlong=overlong)
    return LabelledSet(
        rows=tuple(
            LabelledRow(text.place, encoded.ids, (number[text.label],), encoded.types)
            for text, encoded in cut.kept
        ),
        names=tuple(names),
        longest=cut.longest,
        truncated=cut.truncated,
        dropped=cut.dropped,
    )


def _label(row: Mapping[str, Any], column: str, place: str) -> str:
    value = column_value(row, column, "label", place)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(f"{place}: {column!r} must be a word or a whole number; found {value!r}.")
    label = str(value).strip()
    if not label:
        raise DataError(f"{place}: {column!r} is empty.")
    return label
