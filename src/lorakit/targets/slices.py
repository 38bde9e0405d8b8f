"""Slices: some output rows of a layer as a target of their own, as q, k and v are in a fused projection.

A slice is named ``path[part]``: ``c_attn[q]`` by a part of a known layout (`lorakit.targets.layouts`), several together
as ``c_attn[q,v]``, or ``qkv[0:64,192:256]`` by rows. Slices of one weight are separate targets: each has parameters of
its own, and what is not adapted keeps the base's bits. (loralib calls the case of equal contiguous parts MergedLinear.)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.core.target import Target
from lorakit.errors import ConfigError, listing
from lorakit.ops import Ranges, transformed

_ROWS = re.compile(r"(\d+):(\d+)")


class SliceTarget(Target):
    """Some output rows of another target.

    Attributes:
        whole: The target that the rows are of.
        rows: Which rows.
    """

    def __init__(self, whole: Target, part: str, rows: Ranges) -> None:
        super().__init__(f"{whole.path}[{part}]", whole.module, whole.parameter, whole.storage, whole.binding)
        self.whole, self.part, self.rows = whole, part, rows
        self.reader, self.gain = whole.reader, whole.gain
        stored = whole.shape.stored
        if stored:
            dim = len(stored) - min(2, len(stored))
            stored = (*stored[:dim], len(rows), *stored[dim + 1 :])
        self.shape = dataclasses.replace(whole.shape, out=len(rows), stored=stored)

    @property
    def stored(self) -> Tensor:
        """The stored tensor of the whole."""
        return self.whole.stored

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias for these rows."""
        bias = self.whole.bias
        return None if bias is None else self.rows.take(bias, -1)

    @property
    def base_bias(self) -> Tensor | None:
        """The base's bias for these rows."""
        bias = self.whole.base_bias
        return None if bias is None else self.rows.take(bias, -1)

    def to_matrix(self, stored: Tensor) -> Tensor:
        """The rows of the whole's matrices; a view if they are neighbours."""
        return self.rows.take(self.whole.to_matrix(stored), -2)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The whole's stored layout with zeros in all other rows."""
        return self.replaced(
            self.whole.from_matrix(matrix.new_zeros(*self.batch, self.rows.size, self.in_)), matrix
        )

    def replaced(self, stored: Tensor, matrix: Tensor) -> Tensor:
        """All other rows as they were."""
        return self.whole.from_matrix(self.rows.put(self.whole.to_matrix(stored), matrix, -2))

    def apply(self, x: Tensor, W: Tensor) -> Tensor:
        """What the layer computes for these rows."""
        return self.whole.apply(x, W)

    def weight_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The rows that belong to this target."""
        return self.whole.weight_gradient(x, gradient)

    def apply_kronecker(self, x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
        """That of the whole."""
        return self.whole.apply_kronecker(x, W1, W2)

    def add_low_rank(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """That of the whole; ``y`` is the output of these rows, in the memory of the whole output if possible."""
        return self.whole.add_low_rank(y, x, A, B, scale, dropout)

    def arrange(self, role: str, tensor: Tensor) -> Tensor:
        """That of the whole."""
        return self.whole.arrange(role, tensor)

    def select(self, y: Tensor) -> Tensor:
        """The output of these rows; a view if they are neighbours."""
        return self.rows.take(y, -1)

    def insert(self, y: Tensor, part: Tensor) -> Tensor:
        """In the memory of ``y``, unless a gradient has to flow through what ``y`` held there."""
        if transformed():
            return self.rows.put(y, part.to(y.dtype), -1)
        if self.rows.is_taken_from(y, part, -1):  # the method has worked in place
            return y
        if torch.is_grad_enabled() and (part.requires_grad or y.requires_grad):
            return self.rows.put(y, part.to(y.dtype), -1)
        self.rows.put_(y, part, -1)
        return y

    def spread(self, vector: Tensor) -> Tensor:
        """Zero for every other output feature."""
        return self.rows.put(vector.new_zeros(self.rows.size), vector, -1)

    def overlaps(self, other: Target) -> bool:
        """Whether they have rows in common."""
        return not isinstance(other, SliceTarget) or self.rows.overlaps(other.rows)


def slice_of(whole: Target, part: str, parts: Mapping[str, Ranges]) -> SliceTarget | str:
    """The slice called ``part``, or the reason why there is none.

    Args:
        whole: The target to take rows of.
        part: What stands between the brackets: names of parts or ranges of rows, with commas in between.
        parts: The parts that are known, by name.
    """
    if whole.shape.kind not in ("linear", "parameter"):
        return f"only linear layers and bare parameters have slices of output rows, not an {whole.shape.kind}"
    spans: list[tuple[int, int]] = []
    words = [word.strip() for word in part.split(",")]
    for word in words:
        written = _ROWS.fullmatch(word)
        if written:
            spans.append((int(written[1]), int(written[2])))
        elif word in parts:
            spans += parts[word].spans
        else:
            known = (
                f"its parts are {listing(parts)}" if parts else "the layout of this layer is not known here"
            )
            example = f"{whole.path.rsplit('.', 1)[-1]}[0:{max(1, whole.out // 2)}]"
            return f"it has no part {word!r}: {known}; output rows can be given by number, as in {example!r}"
    try:
        rows = Ranges.of(spans, whole.out)
    except ConfigError as error:
        return f"[{part}] does not name some of its {whole.out} output rows: {error}"
    return SliceTarget(whole, ",".join(words), rows)
