"""Bottleneck adapters: a small network with one narrow hidden layer, in sequence with a layer or beside a block.

In sequence (Houlsby, Pfeiffer) it reads the layer's output, ``y + W2 f(W1 y + b1) + b2``; beside (parallel) it reads
the block's input, ``y + s (W2 f(W1 x + b1) + b2)``. What they compute is not linear, so they are no change of a weight:
they cannot be merged. Sources: Houlsby et al. 2019 (arXiv 1902.00751), Pfeiffer et al. 2020 (arXiv 2005.00247), He et
al. 2021 (arXiv 2110.04366).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.method import Method, Tensors
from lorakit.core.registry import register
from lorakit.core.selection import Adapts
from lorakit.core.target import Shape, Target
from lorakit.errors import ConfigError, near_matches

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Bottleneck(Method):
    """What the three have in common.

    Parameters per target: ``down`` ``(m, width)``, ``down_bias`` ``(m,)``, ``up`` ``(out, m)``, ``up_bias`` ``(out,)``.
    """

    roles: ClassVar[Mapping[str, str]] = {"down_bias": "bias", "up_bias": "bias"}
    adapts: ClassVar[Adapts] = "module"

    activation: str = "relu"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"No activation is called {self.activation!r}.{near_matches(self.activation, ACTIVATIONS)} Known: "
                f"{sorted(ACTIVATIONS)}."
            )

    @abstractmethod
    def hidden(self, shape: Shape) -> int:
        """The width ``m`` of the bottleneck at a target."""

    def read(self, shape: Shape) -> int:
        """The width of what it reads: the output."""
        return shape.out

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Both layers with their biases: ``m (width + out) + m + out`` numbers."""
        m = self.hidden(shape)
        return {
            "down": (m, self.read(shape)),
            "down_bias": (m,),
            "up": (shape.out, m),
            "up_bias": (shape.out,),
        }

    def network(self, p: Tensors, x: Tensor) -> Tensor:
        """``W2 f(W1 x + b1) + b2`` in the dtype of ``x``."""
        h = F.linear(x, p["down"].to(x.dtype), p["down_bias"].to(x.dtype))
        return F.linear(ACTIVATIONS[self.activation](h), p["up"].to(x.dtype), p["up_bias"].to(x.dtype))

    def forward(self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
        """``y + network(y)``."""
        return y + self.network(p, y).to(y.dtype)

    def supports(self, target: Target) -> str | None:
        """Vectors that a module puts out."""
        if target.shape.kind not in ("linear", "module"):
            return f"it acts on the vectors that a linear layer or a block puts out, not on an {target.shape.kind}"
        if target.binding == "parameter":
            return (
                "its weight is read by another module and it is never called, so it has no output to act on"
            )
        return None


@register("houlsby")
@dataclass(frozen=True)
class Houlsby(Bottleneck):
    """A bottleneck after the attention's output projection and after the feed-forward block, before the residual.

    It starts near the identity, not exactly at it: zero biases, and weights from a normal distribution of standard
    deviation ``init_std`` cut off at two of them. The paper trains the layer norms along: adapt them with
    `FullFineTuning` in the same adapter.

    Attributes:
        size: The width of the bottleneck.
        activation: ``"gelu"``, ``"relu"``, ``"silu"`` or ``"tanh"``.
        init_std: 1e-3 as in the authors' code (the paper says 1e-2).
    """

    default_targets: ClassVar[str] = "all-block-outputs"
    starts_at_base: ClassVar[bool] = False

    size: int = 64
    activation: str = "gelu"
    init_std: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("size", self.size)
        _check_positive("init_std", self.init_std)

    def hidden(self, shape: Shape) -> int:
        """``size``."""
        return self.size

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """Small weights, zero biases."""
        sizes, std = self.shapes(target.shape), self.init_std
        tensors = {name: torch.zeros(size) for name, size in sizes.items()}
        for name in ("down", "up"):
            nn.init.trunc_normal_(tensors[name], std=std, a=-2 * std, b=2 * std, generator=generator)
        return tensors


@register("pfeiffer")
@dataclass(frozen=True)
class Pfeiffer(Bottleneck):
    """A bottleneck after the feed-forward block only, its width a fraction of the layer's.

    It starts near the identity: weights as BERT's, normal with standard deviation ``init_std``, zero biases.

    Attributes:
        reduction: The layer's width is divided by this.
        activation: ``"relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.
        init_std: 0.02 as in BERT.
    """

    default_targets: ClassVar[str] = "all-ffn-outputs"
    starts_at_base: ClassVar[bool] = False

    reduction: int = 16
    activation: str = "relu"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("reduction", self.reduction)
        _check_positive("init_std", self.init_std)

    def hidden(self, shape: Shape) -> int:
        """The width divided by ``reduction``, at least 1."""
        return max(1, shape.out // self.reduction)

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """BERT's start."""
        tensors = {name: torch.zeros(size) for name, size in self.shapes(target.shape).items()}
        for name in ("down", "up"):
            tensors[name].normal_(std=self.init_std, generator=generator)
        return tensors


@register("parallel")
@dataclass(frozen=True)
class ParallelAdapter(Bottleneck):
    """A bottleneck beside a block, on the same input: ``y + s (W2 f(W1 x + b1) + b2)``.

    It starts exactly at the base: ``up`` and both biases are zero, ``down`` is as LoRA's ``A``.

    Attributes:
        size: The width of the bottleneck.
        scale: The factor ``s``.
        activation: ``"relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.
    """

    default_targets: ClassVar[str] = "all-ffn"

    size: int = 512
    scale: float = 4.0
    activation: str = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("size", self.size)
        if (
            isinstance(self.scale, bool)
            or not isinstance(self.scale, (int, float))
            or not math.isfinite(self.scale)
        ):
            raise ConfigError(f"scale must be a finite number; got {self.scale!r}.")

    def hidden(self, shape: Shape) -> int:
        """``size``."""
        return self.size

    def read(self, shape: Shape) -> int:
        """The width of the block's input."""
        return shape.in_

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """No change yet."""
        tensors = {name: torch.zeros(size) for name, size in self.shapes(target.shape).items()}
        nn.init.kaiming_uniform_(tensors["down"], a=math.sqrt(5), generator=generator)
        return tensors

    def forward(self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
        """``y + s network(x)``."""
        return torch.add(y, self.network(p, x.to(y.dtype)).to(y.dtype), alpha=self.scale)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}.")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a positive number; got {value!r}.")
