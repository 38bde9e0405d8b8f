"""The terms of a memory bill that follow from counts alone: weights, adapters, gradients, optimizer states, files."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from lorakit.core.walk import base_modules, base_parameters
from lorakit.errors import ConfigError, UnmatchedTargetError, near_matches
from lorakit.ops import packed as packed_product
from lorakit.plan.counting import Counts
from lorakit.targets.find import find

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORAGES = ("dense", "nf4", "int8")


def dtype_called(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        ConfigError: There is none.
    """
    if name not in DTYPES:
        raise ConfigError(
            f"There is no dtype {name!r} here.{near_matches(name, DTYPES)} Known: {', '.join(DTYPES)}."
        )
    return DTYPES[name]


@dataclass(frozen=True)
class Weights:
    """The base in memory.

    Attributes:
        dense: Bytes of what is kept in the base's dtype, buffers included.
        packed: Bytes of the codes and scales of what is kept in four or eight bits.
        packed_numel: Numbers in those.
        widest_packed: Numbers in the largest one.
    """

    dense: int
    packed: int = 0
    packed_numel: int = 0
    widest_packed: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.dense + self.packed

    def unpacking(self, dtype: torch.dtype) -> int:
        """Most bytes that a product with a packed weight needs beside it, see `lorakit.ops.packed`.

        The scales as float32, some rows, and in backward below float32 the whole of one matrix.
        """
        if not self.packed_numel:
            return 0
        whole = self.widest_packed * dtype.itemsize if dtype.itemsize < 4 else 0
        return self.widest_packed // 16 + 4 * packed_product._WIDE_TILE + whole


def nf4_bytes(numel: int, double_quant: bool = True) -> int:
    """Of a matrix in NF4 with blocks of 64: 4.127 bits a number with its scales in eight bits, 4.5 without.

    Source: Dettmers et al. 2023 (arXiv 2305.14314), section 3: blocks of 64, and of 256 for the scales.
    """
    blocks = math.ceil(numel / 64)
    scales = blocks + 4 * math.ceil(blocks / 256) + 4 if double_quant else 4 * blocks  # + 4: their mean
    return math.ceil(numel / 2) + scales


def weights(model: nn.Module, dtype: torch.dtype, storage: str = "dense") -> Weights:
    """The base of a model.

    With ``"nf4"`` or ``"int8"`` what `lorakit.quantize` packs by default: every linear layer, heads left out.

    Raises:
        ConfigError: The storage is unknown, or there is nothing to pack.
    """
    if storage not in STORAGES:
        raise ConfigError(
            f"There is no storage {storage!r}.{near_matches(storage, STORAGES)} Known: {', '.join(STORAGES)}."
        )
    packed: dict[int, int] = {}
    rows = 0
    if storage != "dense":
        try:
            found = {id(target.stored): target.shape for target in find(model, "all-linear")}
        except UnmatchedTargetError as error:
            raise ConfigError(f"There is nothing to keep in few bits. {error}") from error
        packed = {key: shape.numel for key, shape in found.items()}
        rows = sum(shape.numel // shape.in_ for shape in found.values())
    dense = sum(
        p.numel() * (dtype.itemsize if p.is_floating_point() else p.element_size())
        for _, p in base_parameters(model)
        if id(p) not in packed
    )
    buffers = {id(b): b for _, m in base_modules(model) for b in m._buffers.values() if b is not None}
    dense += sum(b.numel() * b.element_size() for b in buffers.values())
    return Weights(
        dense,
        sum(packed.values()) + 4 * rows  # a scale in float32 for each row
        if storage == "int8"
        else sum(nf4_bytes(n) for n in packed.values()),
        sum(packed.values()),
        max(packed.values(), default=0),
    )


def adapter_bytes(counts: Counts, dtype: torch.dtype) -> int:
    """Of an adapter's tensors, in memory or in a file (to which a header with their names adds some kB)."""
    return counts.stored * dtype.itemsize
