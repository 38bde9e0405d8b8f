"""What a run would read: the rows as the model sees them, what is learnt of them, and how long they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError
from lorakit.train.recipe import Recipe
from lorakit.train.split import Split
from lorakit.train.strands import Piece, Strand, pieces_of
from lorakit.train.tasks import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BARS = 12


@dataclass(frozen=True)
class ShownStrand:
    """A strand with its texts.

    Attributes:
        strand: Ids, labels and roles.
        pieces: Its texts, in their order.
    """

    strand: Strand
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class ShownRow:
    """A row for people to look at.

    Attributes:
        number: Among those that are left, from 1.
        id: Its name, or file and line.
        strands: What the model reads and writes.
    """

    number: int
    id: str
    strands: tuple[ShownStrand, ...]

    @property
    def tokens(self) -> int:
        """Of all strands."""
        return sum(len(shown.strand.ids) for shown in self.strands)

    @property
    def learnt(self) -> int:
        """Learnt tokens of all strands."""
        return sum(sum(shown.strand.learnt) for shown in self.strands)


@dataclass(frozen=True)
class Bar:
    """Rows whose length lies between two bounds, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class Preview:
    """What a run would read of one split.

    Attributes:
        split: Which.
        summary: What the run would say about it.
        rows: Some of them.
        total: How many there are.
        tokens: Of all rows.
        learnt: How much of them is learnt, in ``unit``.
        unit: ``"token"``, or what else is learnt.
        longest: Before anything was cut.
        max_length: The recipe's.
        truncated: Rows that were cut.
        dropped: Rows that were left out.
        lost: Tokens that are not read because of that, where it is known.
        histogram: Of the lengths.
        roles: Tokens by who says them, of the rows shown.
    """

    split: Split
    summary: str
    rows: tuple[ShownRow, ...]
    total: int
    tokens: int
    learnt: int
    unit: str
    longest: int
    max_length: int
    truncated: int
    dropped: int
    lost: int
    histogram: tuple[Bar, ...]
    roles: dict[str, int]

    @property
    def share(self) -> float | None:
        """The share of the tokens that is learnt; None where something else is."""
        return self.learnt / self.tokens if self.unit == "token" and self.tokens else None

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "split": self.split,
            "rows": self.total,
            "tokens": self.tokens,
            "learnt": self.learnt,
            "unit": self.unit,
            "longest": self.longest,
            "max_length": self.max_length,
            "truncated": self.truncated,
            "dropped": self.dropped,
            "lost_tokens": self.lost,
            "histogram": [[bar.low, bar.high, bar.rows] for bar in self.histogram],
            "shown": [
                {
                    "id": row.id,
                    "strands": [
                        {
                            "name": shown.strand.name,
                            "note": shown.strand.note,
                            "ids": list(shown.strand.ids),
                            "learnt": list(shown.strand.learnt),
                            "roles": list(shown.strand.roles),
                            "text": "".join(piece.text for piece in shown.pieces),
                        }
                        for shown in row.strands
                    ],
                }
                for row in self.rows
            ],
        }


def preview(
    recipe: Recipe,
    split: Split = "train",
    *,
    rows: int = 3,
    start: int = 1,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Preview:
    """Read and render a split as `train` would, without a model.

    Args:
        recipe: Names data, tokenizer and lengths.
        split: Which part.
        rows: How many rows to show.
        start: The first of them, from 1.
        tokenizer: If it is loaded already.

    Raises:
        DataError: A row is malformed, or training would refuse it.
        ConfigError: The recipe names no such split, or the task reads no tokens.
    """
    task = task_of(recipe)
    if tokenizer is None:
        tokenizer = task.tokenizer(task.resolve())
    if tokenizer is None:
        raise ConfigError(f"task: {recipe.task} reads no tokens, so there is nothing to preview.")
    if split != "train" and task.has_split("train"):
        task.rows(tokenizer, "train")  # which decides what labels there are
    found = task.rows(tokenizer, split)
    if not 1 <= start <= len(found.rows):
        raise ConfigError(f"There is no row {start}: the {split} split has {len(found.rows)}.")
    shown = []
    for number, row in enumerate(found.rows[start - 1 : start - 1 + rows], start):
        strands = tuple(
            ShownStrand(strand, tuple(pieces_of(strand, tokenizer)))
            for strand in task.strands(tokenizer, row)
        )
        shown.append(ShownRow(number, row.id, strands))
    said = Counter(role for row in shown for each in row.strands for role in each.strand.roles)
    return Preview(
        split=split,
        summary=str(found),
        rows=tuple(shown),
        total=len(found.rows),
        tokens=found.tokens,
        learnt=found.learnt,
        unit=task.objective.unit,
        longest=found.longest,
        max_length=recipe.train.max_length,
        truncated=found.truncated,
        dropped=found.dropped,
        lost=getattr(found, "lost", 0),
        histogram=histogram([row.length for row in found.rows]),
        roles=dict(said),
    )


def histogram(lengths: list[int], bars: int = _BARS) -> tuple[Bar, ...]:
    """So many bars of equal width, or fewer where the lengths lie close together; every length is in one."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // bars))
    counts = Counter((length - low) // width for length in lengths)
    return tuple(
        Bar(low + i * width, min(high, low + (i + 1) * width - 1), counts[i])
        for i in range((high - low) // width + 1)
    )
