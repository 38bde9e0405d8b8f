"""LoRA-C: ``W = W0 + s reshape(B A)`` for convolution kernels, with kernel rows on ``B`` and kernel columns on ``A``.

Source: Ding et al. 2024 (arXiv 2410.16954), section 3; Microsoft's loralib for the rank ``r k`` and the view.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.core.method import Tensors
from lorakit.core.registry import register
from lorakit.core.target import Shape, Target
from lorakit.errors import ConfigError
from lorakit.methods.init.uniform import fan_in_uniform
from lorakit.methods.ranked import RankedMethod
from lorakit.methods.settings import check_choice

RANKS = ("r*k", "r")
RESHAPES = ("permute", "view")


@register("lora_c")
@dataclass(frozen=True)
class LoRAC(RankedMethod):
    """Layer-wise low-rank adaptation of convolution kernels.

    The kernel ``(out, channels, k, k)`` is read as a matrix ``(out k, channels k)`` and changed by a product of rank
    ``r k`` or ``r``. Of another number of dimensions, the first half of the kernel (rounded down) stands with the rows:
    nothing of a 1-d kernel, the depth of a 3-d one. Parameters per target: ``lora_A`` ``(*batch, rank, channels k)``,
    ``lora_B`` ``(*batch, out k, rank)``, one pair for each group of channels.

    Attributes:
        r: The rank, or its multiplier, see ``rank``.
        alpha: The numerator of the scale ``alpha / r``; the paper's best results have ``alpha = 2 r``.
        rank_pattern: Another ``r`` for the targets whose path matches a key, as in PEFT: a key is a regular
            expression for the end of the path or, after ``^``, for all of it; the first that matches wins.
        alpha_pattern: The same for ``alpha``.
        rank: ``"r*k"``: the paper's setting 1, with ``k`` the kernel rows (loralib has it too); it recommends it for
            networks smaller than ResNet-50. ``"r"``: setting 2, for larger ones.
        reshape: ``"permute"`` keeps channels apart: row ``(o, u)`` and column ``(c, v)`` are entry ``(o, c, u, v)``.
            ``"view"`` reads the product's memory as a kernel, as loralib does: for its checkpoints, square 2-d kernels.

    Raises:
        ConfigError: A value makes no sense.
    """

    r: int = 4
    rank: str = "r*k"
    reshape: str = "permute"

    roles: ClassVar[Mapping[str, str]] = {"lora_A": "A", "lora_B": "B"}
    default_targets: ClassVar[str] = "all-conv"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rank of LoRA-C", self.rank, RANKS)
        check_choice("reshape of LoRA-C", self.reshape, RESHAPES)

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """``lora_A`` and ``lora_B``; with ``"view"`` one pair that spans all groups, as in loralib."""
        rows, columns = _split(shape.kernel)
        rank = self.r * math.prod(rows) if self.rank == "r*k" else self.r
        groups = math.prod(shape.batch) if self.reshape == "view" else 1
        stack = shape.batch if self.reshape == "permute" else ()
        return {
            "lora_A": (*stack, rank, groups * shape.channels * math.prod(columns)),
            "lora_B": (*stack, shape.out * math.prod(rows), rank),
        }

    def check_start(self, target: Target) -> None:
        """The rank must be one that the kernel as a matrix can have."""
        sizes = self.shapes(target.shape)
        (*_, rank, columns), rows = sizes["lora_A"], sizes["lora_B"][-2]
        if rank > min(rows, columns):
            raise ConfigError(
                f"r={self.r} makes a product of rank {rank} at {target.path!r}, where the kernel as a matrix is "
                f"{rows} x {columns}. Choose a smaller r, give this target its own (rank_pattern), or exclude it."
            )

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """``A`` Kaiming-uniform, ``B`` zero."""
        sizes = self.shapes(target.shape)
        stack = sizes["lora_A"][:-2]
        return {
            "lora_A": fan_in_uniform(sizes["lora_A"], generator, stack=len(stack)),
            "lora_B": torch.zeros(sizes["lora_B"]),
        }

    def delta(self, target: Target, p: Tensors) -> Tensor:
        """``s reshape(B A)``, the kernel unfolded."""
        shape = target.shape
        product = p["lora_B"] * self.scale @ p["lora_A"]
        if self.reshape == "view":
            return product.view(*shape.batch, shape.out, shape.in_)
        rows, columns = (math.prod(part) for part in _split(shape.kernel))
        kernels = product.unflatten(-1, (shape.channels, columns)).unflatten(-3, (shape.out, rows))
        return kernels.transpose(-3, -2).flatten(-3)

    def at_rows(self, shape: Shape, tensors: Tensors, start: int, stop: int) -> tuple[LoRAC, Tensors] | None:
        """The rows of ``B`` that make these kernels; None for loralib's view of several groups, which mixes them."""
        if self.reshape == "view" and shape.batch:
            return None
        rows = math.prod(_split(shape.kernel)[0])
        B = tensors["lora_B"].narrow(-2, start * rows, (stop - start) * rows)
        return self, {**tensors, "lora_B": B}

    def supports(self, target: Target) -> str | None:
        """Convolutions; for ``"view"`` those that loralib has."""
        kernel = target.shape.kernel
        if target.shape.kind != "conv":
            return "LoRA-C reshapes the kernel of a convolution: use LoRA for other layers"
        if self.reshape == "view" and (len(kernel) != 2 or kernel[0] != kernel[1]):
            return "loralib's view is made for square two-dimensional kernels: use reshape='permute'"
        return None


def _split(kernel: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The part of a kernel that stands with the rows of the matrix, and the part that stands with its columns."""
    half = len(kernel) // 2
    return kernel[:half], kernel[half:]
