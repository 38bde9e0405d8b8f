"""Texts with labels, from a recipe's tables to the rows that a classifier is trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorakit.errors import DataError, listing, near_matches
from lorakit.train.columns import column_text, column_value
from lorakit.train.cutting import cut_texts
from lorakit.train.data_sections import LabelledData
from lorakit.train.row_set import RowSet, TokenRow
from lorakit.train.sources import source_rows
from lorakit.train.split import Split, source_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LabelledText:
    """One row of a table.

    Attributes:
        place: File and line.
        text: What is classified.
        second: The second text, where pairs are.
        label: Its name; a whole number as its digits.
    """

    place: str
    text: str
    second: str | None
    label: str

    @property
    def shown(self) -> str:
        """What is classified, for people."""
        return self.text if self.second is None else f"{self.text}\n{self.second}"


@dataclass(frozen=True)
class LabelledRow(TokenRow):
    """One row as the model sees it.

    Attributes:
        id: Its place.
        ids: Token ids.
        labels: The number of its label, alone.
        types: For each token which text it belongs to, where the model wants to know.
    """

    id: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    types: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class LabelledSet(RowSet[LabelledRow]):
    """All rows of a split, and what was done about long ones.

    Attributes:
        names: The labels, in the order of the logits.
    """

    names: tuple[str, ...]

    @property
    def learnt(self) -> int:
        """How many labels are learnt: one a row."""
        return len(self.rows)

    @property
    def taught(self) -> str:
        """The share of each label."""
        counts = Counter(row.labels[0] for row in self.rows)
        shares = [f"{name} {100 * counts[i] / len(self.rows):.0f} %" for i, name in enumerate(self.names)]
        return f"{len(self.names)} labels: {listing(shares, most=12)}"


def load_texts(data: LabelledData, split: Split) -> list[LabelledText]:
    """The rows of a split.

    Raises:
        DataError: A file is missing or malformed, or a row has no text or no label; the message names the line.
        ConfigError: The recipe names no such split.
    """
    return [
        LabelledText(
            str(place),
            column_text(row, data.text, "text", place),
            None if data.second_text is None else column_text(row, data.second_text, "second_text", place),
            _label(row, data.label, str(place)),
        )
        for place, row in source_rows(source_of(data, split), data.format, data.max_rows.get(split))
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
    overlong: Literal["drop", "truncate", "error"] = "truncate",
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
