"""Some places of a dimension, as ranges: taking them out of a tensor and putting them in.

No index tensors: one range is a ``narrow``, evenly spaced ranges of one length (a fused weight that interleaves its
heads) are a ``narrow`` of the unflattened dimension, and any others are taken one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.errors import ConfigError
from lorakit.ops.low_rank import transformed

Span = tuple[int, int]


class _Even(NamedTuple):
    """``times`` steps of ``step`` places, of each of which ``length`` places from ``start`` on are taken."""

    times: int
    step: int
    start: int
    length: int


@dataclass(frozen=True)
class Ranges:
    """Places of a dimension of ``size``: ascending ranges ``(start, stop)`` that neither touch nor overlap.

    Make one with `Ranges.of`. ``dim`` in the methods is the dimension, counted from the end (negative).

    Attributes:
        spans: The ranges.
        size: The whole dimension.
    """

    spans: tuple[Span, ...]
    size: int
    _even: _Even | None = field(init=False, repr=False, compare=False)

    @classmethod
    def of(cls, spans: Iterable[Span], size: int) -> Ranges:
        """Ranges in any order, neighbours joined.

        Raises:
            ConfigError: A range is empty, outside of the dimension, or overlaps another; or there is none.
        """
        joined: list[Span] = []
        for start, stop in sorted(spans):
            if not 0 <= start < stop <= size:
                raise ConfigError(f"{start}:{stop} is not a range of the {size} that there are")
            if joined and start < joined[-1][1]:
                raise ConfigError(f"{start}:{stop} overlaps {joined[-1][0]}:{joined[-1][1]}")
            if joined and start == joined[-1][1]:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        if not joined:
            raise ConfigError("it names no range")
        return cls(tuple(joined), size)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_even", _evenly(self.spans, self.size))

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    def __str__(self) -> str:
        return ",".join(f"{start}:{stop}" for start, stop in self.spans)

    def overlaps(self, other: Ranges) -> bool:
        """Whether a place is in both."""
        return any(a < d and c < b for a, b in self.spans for c, d in other.spans)

    def take(self, t: Tensor, dim: int) -> Tensor:
        """The places, in order; for one range a view, else a copy."""
        even = self._even
        if even is None:
            return torch.cat([t.narrow(dim, start, stop - start) for start, stop in self.spans], dim)
        if even.times == 1:
            return t.narrow(dim, even.start, even.length)
        window = t.unflatten(dim, (even.times, even.step)).narrow(dim, even.start, even.length)
        return window.flatten(dim - 1, dim)

    def put(self, t: Tensor, part: Tensor, dim: int) -> Tensor:
        """A new tensor: ``t`` with ``part`` at the places."""
        even = self._even
        if even is None:
            for at, start, stop in self._pieces():
                piece = part.narrow(dim, at, stop - start)
                t = torch.slice_scatter(t, piece, dim, start, stop)
            return t
        if even.times == 1:
            return torch.slice_scatter(t, part, dim, even.start, even.start + even.length)
        steps = t.unflatten(dim, (even.times, even.step))
        pieces = part.unflatten(dim, (even.times, even.length))
        changed = torch.slice_scatter(steps, pieces, dim, even.start, even.start + even.length)
        return changed.flatten(dim - 1, dim)

    def put_(self, t: Tensor, part: Tensor, dim: int) -> None:
        """Write ``part`` into ``t``; where ``part`` is still the view that ``take`` gave, nothing is left to do."""
        even = self._even
        if even is None:
            for at, start, stop in self._pieces():
                t.narrow(dim, start, stop - start).copy_(part.narrow(dim, at, stop - start))
        elif even.times == 1:
            if not self.is_taken_from(t, part, dim):
                t.narrow(dim, even.start, even.length).copy_(part)
        else:
            window = t.unflatten(dim, (even.times, even.step)).narrow(dim, even.start, even.length)
            window.copy_(part.unflatten(dim, (even.times, even.length)))

    def is_taken_from(self, t: Tensor, part: Tensor, dim: int) -> bool:
        """Whether ``part`` is the memory of these places of ``t``."""
        if transformed() or len(self.spans) > 1:
            return False
        window = t.narrow(dim, self.spans[0][0], len(self))
        return window.data_ptr() == part.data_ptr() and window.stride() == part.stride()

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """For each range: where it begins among the places, and its own start and stop."""
        at = 0
        for start, stop in self.spans:
            yield at, start, stop
            at += stop - start


def _evenly(spans: tuple[Span, ...], size: int) -> _Even | None:
    start, length = spans[0][0], spans[0][1] - spans[0][0]
    if len(spans) == 1:
        return _Even(1, size, start, length)
    step, left = divmod(size, len(spans))
    even = all(span == (start + i * step, start + i * step + length) for i, span in enumerate(spans))
    return _Even(len(spans), step, start, length) if even and not left and start + length <= step else None
