"""Folding changes into a stored weight, a block of output rows at a time.

In memory and from the disk alike (`lorakit.attach.merge`, `lorakit.models.streaming_merge`): both go through the same
blocks, so both give the same bits. The new weight is summed in at least float32 and rounded once; several changes are
each measured from the base. Beside the stored tensor and the one that is written there is never more than a block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.core.method import Tensors, WeightMethod
from lorakit.core.target import Target
from lorakit.ops import Ranges, own_precision
from lorakit.targets.slices import SliceTarget

BLOCK_NUMBERS = 2**18
"""The most numbers of a block: 1 MB in float32."""


class Change(NamedTuple):
    """One adapter at one target, to be folded into the stored weight of the target.

    Attributes:
        target: Where.
        method: What.
        parameters: Its tensors there, the shared ones included.
        weight: A factor on the change.
    """

    target: Target
    method: WeightMethod
    parameters: Tensors
    weight: float


@dataclass(frozen=True)
class Part:
    """What a change does to some rows of its target.

    Attributes:
        change: The change of the whole target.
        start: The first row, of the target's own.
        stop: The row after the last.
        sums: By dtype, what the method has to know of all rows of the target, see `WeightMethod.sums_over_rows`.
    """

    change: Change
    start: int
    stop: int
    sums: Mapping[torch.dtype, Tensors]

    def at(self, rows: Target, dtype: torch.dtype) -> tuple[WeightMethod, dict[str, Tensor]]:
        """The method and its parameters at these rows, in ``dtype``, without the sums.

        Args:
            rows: These rows as a target.
            dtype: What is computed in.
        """
        method, parameters = self.change.method, self.change.parameters
        if rows is not self.change.target:
            found = method.at_rows(self.change.target.shape, parameters, self.start, self.stop)
            assert found is not None
            method, parameters = found
        return method, {name: t.to(dtype) for name, t in parameters.items()}


@dataclass(frozen=True)
class Block:
    """Some rows of a stored weight with all that changes them.

    Attributes:
        whole: The weight.
        parts: What changes each of the rows, in order.
        start: The first row.
        stop: The row after the last.
    """

    whole: Target
    parts: tuple[Part, ...]
    start: int
    stop: int

    def view(self, stored: Tensor) -> Tensor:
        """These rows of a tensor with the size of the stored one, in its memory: ``(*batch, stop - start, in)``."""
        return self.whole.to_matrix(stored).narrow(-2, self.start, self.stop - self.start)

    def merged(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The new values of the rows, computed in ``dtype``."""
        base = self.view(stored).to(dtype)
        running = base
        for part in self.parts:
            rows = self.rows_of(part)
            method, p = part.at(rows, dtype)
            with own_precision(stored):
                running = method.fold(
                    rows, {**p, **part.sums.get(dtype, {})}, running, base, part.change.weight
                )
        return running

    def sums(self, part: Part, stored: Tensor, dtype: torch.dtype) -> Tensors:
        """What one of the parts adds to what its method has to know of all rows."""
        rows = self.rows_of(part)
        method, p = part.at(rows, dtype)
        with own_precision(stored):
            return method.sums_over_rows(rows, p, self.view(stored).to(dtype))

    def rows_of(self, part: Part) -> Target:
        """The rows as a target: that of the change, where they are all of its rows."""
        if part.stop - part.start == part.change.target.out:
            return part.change.target
        rows = Ranges.of([(self.start, self.stop)], self.whole.out)
        return SliceTarget(self.whole, f"{self.start}:{self.stop}", rows)


@dataclass(frozen=True)
class WholeBlock:
    """A stored weight that has no rows which one could go through.

    A method does not say what its change is at some rows, two changes see the weight as matrices of different layouts,
    or the matrix is no view of what is stored.

    Attributes:
        changes: What changes it, at any of its targets.
        added: What is added on top, of the size of the stored weight.
    """

    changes: tuple[Change, ...]
    added: Tensor | None = None

    def view(self, stored: Tensor) -> Tensor:
        """The tensor itself."""
        return stored

    def merged(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The new values, computed in ``dtype``."""
        base = stored.to(dtype)
        total = base
        for i, change in enumerate(self.changes):
            p = {name: t.to(dtype) for name, t in change.parameters.items()}
            own_base = change.target.to_matrix(base)
            running = change.target.to_matrix(total) if i else own_base
            with own_precision(stored):
                new = change.method.fold(change.target, p, running, own_base, change.weight)
            total = change.target.replaced(total, new)
        return total if self.added is None else total + self.added


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a merge is summed in: the dtype of the stored weight, at least float32."""
    return torch.promote_types(dtype, torch.float32)


def fold(stored: Tensor, changes: Sequence[Change], out: Tensor, added: Tensor | None = None) -> None:
    """Write the merged weight into ``out``, rounding once.

    Args:
        stored: The base as it is stored, of any floating dtype.
        changes: At least one; all at targets of this weight.
        out: Of the size of ``stored``, which it may be.
        added: What is added on top.
    """
    if out is not stored and any(change.target.part for change in changes):
        out.copy_(stored)  # slices leave the other rows as they are
    for block in blocks(stored, changes, added):
        block.view(out).copy_(block.merged(stored, wide_dtype(stored.dtype)))


def bias_delta(changes: Sequence[Change], dtype: torch.dtype) -> Tensor | None:
    """What the bias of a layer gains by changes of its weight of some dtype: one number for each output feature."""
    total: Tensor | None = None
    for change in changes:
        p = {name: t.to(wide_dtype(dtype)) for name, t in change.parameters.items()}
        extra = change.method.bias_delta(change.target, p)
        if extra is not None:
            extra = change.weight * change.target.spread(extra)
            total = extra if total is None else total + extra
    return total


def blocks(
    stored: Tensor,
    changes: Sequence[Change],
    added: Tensor | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (),
) -> Iterator[Block | WholeBlock]:
    """The parts in which changes are folded into a stored weight; they do not overlap.

    So each can be written in place of its base before the next is read.

    Args:
        stored: The base as it is stored.
        changes: All at targets of this weight.
        added: What is added on top.
        dtypes: In which the new values will be asked for; by default `wide_dtype`.
    """
    whole = _shared_rows(stored, changes) if added is None else None
    if whole is None:
        yield WholeBlock(tuple(changes), added)
        return
    sums: list[dict[torch.dtype, Tensors]] = [{} for _ in changes]
    found = _cut(whole, changes, sums)
    for dtype in dtypes or (wide_dtype(stored.dtype),):
        for change, known in zip(changes, sums, strict=True):
            if type(change.method).sums_over_rows is not WeightMethod.sums_over_rows:
                known[dtype] = _added_up(found, change, stored, dtype)
    yield from found


def _shared_rows(stored: Tensor, changes: Sequence[Change]) -> Target | None:
    """The weight as rows in which all changes can be told apart; None where there are no such rows."""
    wholes = [c.target.whole if isinstance(c.target, SliceTarget) else c.target for c in changes]
    matrices = [whole.to_matrix(stored) for whole in wholes]
    # A layer and its bare parameter may see one tensor as matrices of different layouts.
    layouts = {(tuple(matrix.shape), matrix.stride()) for matrix in matrices}
    if len(layouts) != 1 or matrices[0].untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
        return None
    if any(c.method.at_rows(c.target.shape, c.parameters, 0, 1) is None for c in changes):
        return None
    return wholes[0]


def _cut(
    whole: Target, changes: Sequence[Change], sums: Sequence[Mapping[torch.dtype, Tensors]]
) -> list[Block]:
    """Blocks of neighbouring rows that the same changes act on."""
    spans = [c.target.rows.spans if isinstance(c.target, SliceTarget) else ((0, whole.out),) for c in changes]
    edges = sorted({edge for own in spans for span in own for edge in span})
    acting: list[list[tuple[int, int]]] = [
        [] for _ in edges
    ]  # from each edge on: a change, and which of its rows
    for i, own in enumerate(spans):
        at = 0
        for start, stop in own:
            for k in range(bisect_left(edges, start), bisect_left(edges, stop)):
                acting[k].append((i, at + edges[k] - start))
            at += stop - start
    most = max(1, BLOCK_NUMBERS // max(1, whole.shape.numel // max(1, whole.out)))
    found = []
    for (low, high), here in zip(pairwise(edges), acting, strict=False):
        for start in range(low, high, most) if here else ():
            stop = min(start + most, high)
            parts = (Part(changes[i], at + start - low, at + stop - low, sums[i]) for i, at in here)
            found.append(Block(whole, tuple(parts), start, stop))
    return found


def _added_up(found: Sequence[Block], change: Change, stored: Tensor, dtype: torch.dtype) -> Tensors:
    """What the blocks of a change say of all its rows."""
    total: dict[str, Tensor] = {}
    for block in found:
        for part in block.parts:
            if part.change is change:
                for name, value in block.sums(part, stored, dtype).items():
                    total[name] = total[name] + value if name in total else value
    return total


def same_changes(one: Sequence[Change], other: Sequence[Change]) -> bool:
    """Whether two uses of one weight are changed alike: by the same tensors, at the same rows of the stored tensor."""

    def key(change: Change) -> tuple[object, ...]:
        tensors: Mapping[str, int] = {name: id(t) for name, t in change.parameters.items()}
        return change.target.part, change.method, change.weight, tuple(sorted(tensors.items()))

    return [key(c) for c in one] == [key(c) for c in other]
