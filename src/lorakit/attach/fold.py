"""Folding changes into a stored weight, a block of output rows at a time.

In memory and from the disk alike (`lorakit.attach.merge`, `lorakit.models.streaming_merge`): both go through the same
blocks, so both give the same bits. The new weight is summed in at least float32 and rounded once; several changes are
each measured from the base. Beside the stored tensor and the one that is written there is never more than a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
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
class Block:
    """Some rows of a stored weight with all that changes them.

    Attributes:
        changes: What changes them; all at one target.
        start: The first row.
        stop: The row after the last.
    """

    changes: tuple[Change, ...]
    start: int
    stop: int

    def view(self, stored: Tensor) -> Tensor:
        """These rows of a tensor with the size of the stored one, in its memory: ``(*batch, stop - start, in)``."""
        return self.changes[0].target.to_matrix(stored).narrow(-2, self.start, self.stop - self.start)

    def merged(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The new values of the rows, computed in ``dtype``."""
        base = self.view(stored).to(dtype)
        running = base
        for change in self.changes:
            p = {name: self._rows(change, name, t).to(dtype) for name, t in change.parameters.items()}
            target = self._target(change.target)
            with own_precision(stored):
                running = change.method.fold(target, p, running, base, change.weight)
        return running

    def _rows(self, change: Change, name: str, tensor: Tensor) -> Tensor:
        if self.stop - self.start == change.target.out:  # all of them
            return tensor
        along = change.method.along_rows(change.target.shape)
        assert along is not None
        return tensor.narrow(along[name], self.start, self.stop - self.start) if name in along else tensor

    def _target(self, target: Target) -> Target:
        if self.stop - self.start == target.out:
            return target
        rows = Ranges.of([(self.start, self.stop)], target.out)
        return SliceTarget(target, f"{self.start}:{self.stop}", rows)


@dataclass(frozen=True)
class WholeBlock:
    """A stored weight whose changes cannot be told apart by rows, or that overlapping slices change.

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
    stored: Tensor, changes: Sequence[Change], added: Tensor | None = None
) -> Iterator[Block | WholeBlock]:
    """The parts in which changes are folded into a stored weight; they do not overlap.

    So each can be written in place of its base before the next is read.
    """
    targets: dict[tuple[object, ...], list[Change]] = {}
    views = added is None
    for change in changes:
        matrix = change.target.to_matrix(stored)
        # A layer and its bare parameter may see one tensor as matrices of different layouts.
        layout = change.target.part, tuple(matrix.shape), matrix.stride()
        targets.setdefault(layout, []).append(change)
        # Interleaved slices are copies, through which nothing can be written.
        views = views and matrix.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    firsts = [group[0].target for group in targets.values()]
    if not views or any(a.overlaps(b) for a, b in combinations(firsts, 2)):
        yield WholeBlock(tuple(changes), added)
        return
    for group in targets.values():
        target = group[0].target
        rows = target.out
        if all(c.method.along_rows(target.shape) is not None for c in group):
            each = max(1, target.shape.numel // max(1, rows))
            rows = min(rows, max(1, BLOCK_NUMBERS // each))
        for start in range(0, target.out, rows):
            yield Block(tuple(group), start, min(start + rows, target.out))


def same_changes(one: Sequence[Change], other: Sequence[Change]) -> bool:
    """Whether two uses of one weight are changed alike: by the same tensors, at the same rows of the stored tensor."""

    def key(change: Change) -> tuple[object, ...]:
        tensors: Mapping[str, int] = {name: id(t) for name, t in change.parameters.items()}
        return change.target.part, change.method, change.weight, tuple(sorted(tensors.items()))

    return [key(c) for c in one] == [key(c) for c in other]
