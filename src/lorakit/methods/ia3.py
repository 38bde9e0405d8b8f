"""IA3: learnt factors on attention keys, on attention values, and inside the feed-forward block.

Source: Liu et al. 2022 (arXiv 2205.05638), section 3.3: ``l_k * K``, ``l_v * V``, ``l_ff * activation``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lorakit.core.architectures import is_feedforward_down
from lorakit.core.method import Tensors, WeightMethod
from lorakit.core.registry import register
from lorakit.core.selection import pattern_matches
from lorakit.core.target import Shape, Target
from lorakit.errors import ConfigError

Side = Literal["output", "input"]


@register("ia3")
@dataclass(frozen=True)
class IA3(WeightMethod):
    """Infused adapter by inhibiting and amplifying inner activations: ``W' = diag(l) W`` or ``W' = W diag(l)``.

    Parameters per target: ``ia3_l``, one number for each output feature ``(*batch, out)``, which scales the bias of the
    layer too; or in a feed-forward layer, one for each input feature ``(*batch, in)`` (for each input channel of a
    convolution). They start at one.

    By default the layers that make keys and values and those that lead out of the feed-forward block are adapted, by
    the model's architecture; an architecture that is not known needs ``targets``.

    Attributes:
        feedforward: The targets whose *input* is scaled: regular expressions for the end of a path or, after ``^``, for
            all of it, as in LoRA's ``rank_pattern``. By default those that are called as the layers out of the
            feed-forward block are in the architectures that are known here (``down_proj``, ``fc2``, ...).
        side: Which side of the targets that no pattern names is scaled.

    Raises:
        ConfigError: A value makes no sense.
    """

    feedforward: tuple[str, ...] | None = None
    side: Side = "output"

    roles: ClassVar[Mapping[str, str]] = {"ia3_l": "gain"}
    default_targets: ClassVar[str] = "all-keys-values-feedforward"

    def __post_init__(self) -> None:
        if self.side not in get_args(Side):
            raise ConfigError(f"side is 'output' or 'input'; got {self.side!r}.")
        if self.feedforward is not None:
            given = (self.feedforward,) if isinstance(self.feedforward, str) else tuple(self.feedforward)
            if not all(isinstance(pattern, str) for pattern in given):
                raise ConfigError(f"feedforward takes patterns for paths; got {self.feedforward!r}.")
            object.__setattr__(self, "feedforward", given)

    def for_path(self, path: str) -> IA3:
        """With the side that the patterns give one target."""
        if self.feedforward is None:
            inside = is_feedforward_down(path)
        else:
            inside = any(pattern_matches(pattern, path) for pattern in self.feedforward)
        return dataclasses.replace(self, feedforward=(), side="input" if inside else self.side)

    def patterns(self) -> tuple[str, ...]:
        """Those of ``feedforward``, where they are given."""
        return self.feedforward or ()

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """``ia3_l``."""
        return {"ia3_l": (*shape.batch, shape.out if self.side == "output" else shape.channels)}

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """Ones."""
        return {"ia3_l": torch.ones(self.shapes(target.shape)["ia3_l"])}

    def weight(self, target: Target, p: Tensors, W: Tensor) -> Tensor:
        """``diag(l) W`` or ``W diag(l)``."""
        return W * self._along(target.shape, p["ia3_l"]).to(W.dtype)

    def along_rows(self, shape: Shape) -> Mapping[str, int] | None:
        """The factors, where they are on the outputs."""
        return {"ia3_l": -1} if self.side == "output" else {}

    def bias_delta(self, target: Target, p: Tensors) -> Tensor | None:
        """``(l - 1) * bias`` where outputs are scaled."""
        bias = target.base_bias
        if self.side == "input" or bias is None:
            return None
        gain = p["ia3_l"].flatten()
        return (gain - 1) * bias.detach().to(gain)

    def forward(self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
        """``l * y``; or ``y`` and what the layer makes of ``(l - 1) * x``, its own output being there already."""
        gain = p["ia3_l"]
        if self.side == "output":
            y = target.scale_out(y, gain).to(
                y.dtype
            )  # rounded once: a gain near one has few bits to say it in bf16
            bias, base = target.bias, target.base_bias
            if bias is None or base is None or bias is base:
                return y
            # Another adapter has changed the bias that is in y. What it added is not to be scaled.
            return target.scale_add_bias(y, (bias - base) * (1 - gain.flatten()), 1.0)
        W = target.weight()
        if target.shape.kernel:  # a kernel is smaller than the input that it runs over
            more = W * self._along(target.shape, gain - 1).to(W.dtype)
        else:
            x, more = x * (gain - 1).to(x.dtype), W
        return y + target.apply(x, more.to(y.dtype))

    def supports(self, target: Target) -> str | None:
        """Inputs that have features, and outputs that are this weight's alone."""
        if self.side == "input":
            if target.shape.lookup:
                return (
                    "its input is an index, which has no features to scale: scale its output (side='output')"
                )
            return None
        if target.binding == "parameter":
            biases = [
                name
                for name, value in target.module._parameters.items()
                if value is not None and name.endswith("bias") and name != target.parameter
            ]
            if biases:
                return f"its module reads the weight directly and adds {biases[0]}, which would not be scaled along"
        return None

    def _along(self, shape: Shape, gain: Tensor) -> Tensor:
        """The factors laid along the rows or the columns of the matrices."""
        if self.side == "output":
            return gain.unsqueeze(-1)
        return gain.repeat_interleave(math.prod(shape.kernel), -1).unsqueeze(-2)
