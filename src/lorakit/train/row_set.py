"""All rows of a split as token ids, and what was done about long ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from lorakit.errors import listing


class Row(Protocol):
    """What every task's rows have: a size, and what is learnt from them."""

    @property
    def id(self) -> str:
        """Names it in messages."""

    @property
    def length(self) -> int:
        """How much the model reads of it: tokens, or 1 for an image; batches are planned by it."""

    @property
    def texts(self) -> Sequence[Row]:
        """What the model reads of it, each in a row of its own: mostly itself alone."""

    @property
    def written(self) -> int:
        """Tokens that an encoder-decoder writes for it; 0 where the model only reads."""

    @property
    def content(self) -> Any:
        """What is trained on, as JSON can hold it; a run that is resumed must find the same."""


@dataclass(frozen=True)
class TokenRow:
    """A row of token ids with labels, as the model sees it.

    Attributes:
        id: The example's name, or its place.
        ids: Token ids.
        labels: What is learnt: for each token its label, -100 where nothing is learnt; or for the row, alone.
    """

    id: str
    ids: tuple[int, ...]
    labels: tuple[Any, ...]

    @property
    def length(self) -> int:
        """Its tokens."""
        return len(self.ids)

    @property
    def texts(self) -> Sequence[Row]:
        """Itself."""
        return (self,)

    @property
    def written(self) -> int:
        """None."""
        return 0

    @property
    def content(self) -> Any:
        """Ids and labels."""
        return [self.ids, self.labels]


R = TypeVar("R", bound=Row)


@dataclass(frozen=True, kw_only=True)
class RowSet(Generic[R]):
    """The rows of a split.

    Attributes:
        rows: Those that are left.
        longest: Tokens of the longest row before anything was cut.
        truncated: Rows that were cut to the greatest length.
        dropped: Rows that were left out because they are longer.
    """

    rows: tuple[R, ...]
    longest: int
    truncated: int = 0
    dropped: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(row.length for row in self.rows)

    @property
    def learnt(self) -> int:
        """How much is learnt, in the unit of the task's objective; one a row, unless a task says otherwise."""
        return len(self.rows)

    @property
    def taught(self) -> str:
        """What the rows teach, in words."""
        raise NotImplementedError

    def __str__(self) -> str:
        words = (
            f"{len(self.rows):,} rows, {self.tokens:,} tokens ({self.tokens / len(self.rows):.0f} a row, "
            f"longest {self.longest}), {self.taught}"
        )
        if self.dropped:
            words += f"; {self.dropped} longer rows left out"
        if self.truncated:
            words += f"; {self.truncated} longer rows cut"
        return words


@dataclass(frozen=True, kw_only=True)
class NamedSet(RowSet[R]):
    """The rows of a split whose labels have names.

    Attributes:
        names: The labels, in the order of the logits.
    """

    names: tuple[str, ...]

    def shares(self, labels: Iterable[int]) -> str:
        """The share of each label among some, for people: ``"cat 75 %, dog 25 %"``."""
        counts = Counter(labels)
        total = counts.total()
        shares = [f"{name} {100 * counts[i] / total:.0f} %" for i, name in enumerate(self.names)]
        return listing(shares, most=12)
