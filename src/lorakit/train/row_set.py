"""All rows of a split as token ids, and what was done about long ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Row(Protocol):
    """What every task's rows have: token ids."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids."""


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
        return sum(len(row.ids) for row in self.rows)

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
