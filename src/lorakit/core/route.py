"""Routes: which adapters act in a call. A route is a value; nothing about it is written to the model.

``OFF`` is the base model, ``Mix`` a weighted set of adapters, ``Rows`` one of these for each row of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.errors import RoutingError


@dataclass(frozen=True)
class Mix:
    """A weighted set of adapters: the output is ``base + sum_i weight_i * (output_i - base)``.

    Attributes:
        weights: Pairs ``(name, weight)``, sorted by name; no name twice. Empty means the base model.
        only: The adapter's name, where it is one alone with weight one: the usual case, asked in every call of a layer.
    """

    weights: tuple[tuple[str, float], ...] = ()
    only: str | None = field(init=False, compare=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if len(self.weights) == 1 and self.weights[0][1] == 1:
            object.__setattr__(self, "only", self.weights[0][0])

    @classmethod
    def of(cls, route: str | Mapping[str, float] | Sequence[str] | None) -> Mix:
        """A mix from a name, a mapping of weights, a sequence of names (weight one each), or None."""
        if route is None:
            return OFF
        if isinstance(route, str):
            return cls(((route, 1.0),))
        if isinstance(route, Mapping):
            for name, weight in route.items():
                if (
                    not isinstance(name, str)
                    or not isinstance(weight, (int, float))
                    or not math.isfinite(weight)
                ):
                    raise RoutingError(
                        f"A mix is {{name: weight}} with finite weights; got {name!r}: {weight!r}."
                    )
            return cls(tuple(sorted((name, float(w)) for name, w in route.items())))
        if not isinstance(route, Iterable) or not all(isinstance(name, str) for name in route):
            raise RoutingError(
                f"A route is an adapter's name, several names, {{name: weight}}, or None for the base; got {route!r}. "
                "(One route for each row of a batch is given as rows=[...].)"
            )
        route = list(route)
        if len(set(route)) != len(route):
            raise RoutingError(
                f"An adapter is named twice in {list(route)}; give weights instead: {{name: weight}}."
            )
        return cls(tuple(sorted((name, 1.0) for name in route)))

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters in it."""
        return tuple(name for name, _ in self.weights)

    def without(self, merged: Mix) -> Mix:
        """What is left to apply when ``merged`` is already in the weights."""
        inside = dict(merged.weights)
        if any(dict(self.weights).get(name) != weight for name, weight in inside.items()):
            raise RoutingError(
                f"The weights of the model now include {_words(merged)}, so {_words(self)} cannot be run. "
                "Call lorakit.unmerge(model) first."
            )
        return Mix(tuple((name, weight) for name, weight in self.weights if name not in inside))


OFF = Mix()


@dataclass(frozen=True)
class Rows:
    """A route for each row of a batch (dimension 0 of what the layers receive), or for each token of one packed row.

    Attributes:
        mixes: The different routes that occur.
        index: For each row, which of ``mixes`` it takes.
    """

    mixes: tuple[Mix, ...]
    index: tuple[int, ...]
    groups: tuple[tuple[Mix, slice | Tensor], ...] = field(compare=False, repr=False, default=())
    only: ClassVar[None] = None

    @classmethod
    def of(cls, rows: Sequence[str | Mapping[str, float] | None]) -> Rows:
        """One entry per row: a name, a mapping of weights, or None for the base."""
        if isinstance(rows, str):
            raise RoutingError(
                f"rows takes a sequence with one entry per row of the batch; got the string {rows!r}."
            )
        if not isinstance(rows, Iterable):
            raise RoutingError(f"rows takes a sequence with one entry per row of the batch; got {rows!r}.")
        each = [Mix.of(row) for row in rows]
        mixes = tuple(dict.fromkeys(each))
        index = tuple(mixes.index(mix) for mix in each)
        return cls(mixes, index, _groups(mixes, index))

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters that occur."""
        return tuple(dict.fromkeys(name for mix in self.mixes for name in mix.names))

    def places(self) -> tuple[list[Tensor], Tensor]:
        """The row numbers of each group, and the order that puts the groups, end to end, back into rows."""
        numbers = [torch.arange(r.start, r.stop) if isinstance(r, slice) else r for _, r in self.groups]
        return numbers, torch.argsort(torch.cat(numbers))

    def without(self, merged: Mix) -> Rows:
        """What is left to apply when ``merged`` is already in the weights."""
        mixes = tuple(mix.without(merged) for mix in self.mixes)
        return Rows(mixes, self.index, _groups(mixes, self.index))


Route = Mix | Rows


def _groups(mixes: tuple[Mix, ...], index: tuple[int, ...]) -> tuple[tuple[Mix, slice | Tensor], ...]:
    """For each mix, its rows: a slice when they are neighbours (then their outputs need not be copied)."""
    groups: list[tuple[Mix, slice | Tensor]] = []
    for i, mix in enumerate(mixes):
        rows = [row for row, which in enumerate(index) if which == i]
        contiguous = rows[-1] - rows[0] + 1 == len(rows)
        groups.append((mix, slice(rows[0], rows[-1] + 1) if contiguous else torch.tensor(rows)))
    return tuple(groups)


def _words(mix: Mix) -> str:
    if not mix.weights:
        return "the base model"
    return " + ".join(name if weight == 1 else f"{weight:g} * {name}" for name, weight in mix.weights)
