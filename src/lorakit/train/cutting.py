"""Texts, or pairs of texts, as token ids; and what becomes of those that are too long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from lorakit.errors import DataError, listing
from lorakit.models.encoding import portions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["drop", "truncate", "error"]


@dataclass(frozen=True)
class PlainText:
    """A text, or a pair of texts, with its place.

    Attributes:
        place: File and line.
        text: The text.
        second: The second text, where pairs are.
    """

    place: str
    text: str
    second: str | None

    @property
    def shown(self) -> str:
        """What is read, for people."""
        return self.text if self.second is None else f"{self.text}\n{self.second}"


T = TypeVar("T", bound=PlainText)


@dataclass(frozen=True)
class Encoded:
    """A text, or a pair of texts, as the model sees it.

    Attributes:
        ids: Token ids.
        types: For each token which text it belongs to, where the model wants to know.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...] | None


@dataclass(frozen=True)
class Cut(Generic[T]):
    """Texts that were cut to a length.

    Attributes:
        kept: Those that are left, with their tokens.
        longest: Tokens of the longest before anything was cut.
        truncated: How many were cut.
        dropped: How many were left out.
    """

    kept: tuple[tuple[T, Encoded], ...]
    longest: int
    truncated: int
    dropped: int


def cut_texts(
    texts: Sequence[T], tokenizer: PreTrainedTokenizerBase, *, max_length: int, overlong: Overlong
) -> Cut[T]:
    """Tokens of texts.

    Args:
        texts: At least one.
        tokenizer: The model's.
        max_length: Most tokens of a row; never more than the tokenizer says its model reads.
        overlong: What to do with a longer one: leave it out, cut the end of its (longer) text off, or stop.

    Raises:
        DataError: A row is too long, or none is left.
    """
    most = min(max_length, tokenizer.model_max_length)
    kept, cut, longest = [], [], 0
    for text, encoded in _encoded(texts, tokenizer):
        length = len(encoded["input_ids"])
        longest = max(longest, length)
        if length > most:
            cut.append(text.place)
            if overlong == "drop":
                continue
            encoded = dict(tokenizer(text.text, text.second, truncation=True, max_length=most))
        types = encoded.get("token_type_ids")
        kept.append((text, Encoded(tuple(encoded["input_ids"]), None if types is None else tuple(types))))
    truncated, dropped = check_cut(cut, len(kept), len(texts), longest, most, overlong)
    return Cut(tuple(kept), longest, truncated, dropped)


def _encoded(
    texts: Sequence[T], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[T, dict[str, list[int]]]]:
    """Each text with what the tokenizer makes of it; many are read in one call."""
    # An empty second text is none to the tokenizer, where it gets the one pair alone.
    for alone, group in groupby(texts, lambda text: not text.second):
        several = list(group)
        for some in portions(several, [len(text.shown) for text in several]):
            firsts, seconds = [text.text for text in some], [text.second or "" for text in some]
            encoded = tokenizer(firsts, None if alone else seconds, verbose=False)
            for i, text in enumerate(some):
                yield text, {name: column[i] for name, column in encoded.items()}


def check_cut(
    cut: Sequence[str], kept: int, total: int, longest: int, most: int, overlong: Overlong
) -> tuple[int, int]:
    """Stop where long rows are an error, and where nothing is left.

    Args:
        cut: The places of rows that are too long.
        kept: Rows that are left.
        total: All rows.
        longest: Tokens of the longest.
        most: Tokens that may be read.
        overlong: What to do with longer ones.

    Returns:
        How many rows were cut, and how many were left out.

    Raises:
        DataError: A row is too long, or none is left.
    """
    advice = (
        f"The longest has {longest} tokens; at most {most} are read (train.max_length, and the model's own)."
    )
    if cut and overlong == "error":
        raise DataError(f"{len(cut)} rows are too long: {listing(cut, most=4)}. {advice}")
    if not kept:
        raise DataError(f"No row is left: all {total} are too long. {advice}")
    return (len(cut), 0) if overlong == "truncate" else (0, len(cut))
