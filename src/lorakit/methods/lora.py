"""LoRA: ``W = W0 + s B A`` with ``s = alpha / r`` or, as rsLoRA, ``s = alpha / sqrt(r)``.

Sources: Hu et al. 2021 (arXiv 2106.09685), section 4.1; Kalajdzievski 2023 (arXiv 2312.03732) for rsLoRA.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.core.method import Factors, LowRankMethod, Tensors
from lorakit.core.registry import register
from lorakit.core.selection import pattern_matches
from lorakit.core.target import Shape, Target
from lorakit.errors import ConfigError, near_matches
from lorakit.methods.init import INITS

SCALINGS: Mapping[str, Callable[[float, int], float]] = {
    "lora": lambda alpha, r: alpha / r,
    "rslora": lambda alpha, r: alpha / math.sqrt(r),
}


@register("lora")
@dataclass(frozen=True)
class LoRA(LowRankMethod):
    """Low-rank adaptation of a dense layer.

    Parameters per target: ``lora_A`` ``(*batch, r, in)``, ``lora_B`` ``(*batch, out, r)``: ``r (in + out)``
    numbers a matrix; with ``bias``, ``lora_bias`` ``(out,)``.

    Attributes:
        r: The rank of the change.
        alpha: The numerator of the scale; with Adam it acts like a factor on the learning rate.
        scaling: ``"lora"`` for ``alpha / r``, ``"rslora"`` for ``alpha / sqrt(r)``, which keeps the size of the change
            from falling as ``r`` grows.
        dropout: Probability of dropping an entry of the input on the way to ``A``, in training.
        init: ``"kaiming"`` (loralib, PEFT) or ``"gaussian"`` (the paper, diffusers); either way the change starts at 0.
        bias: Train a bias along with ``B``: ``y += s lora_bias``.
        rank_pattern: Another rank for the targets whose path matches a key, as in PEFT: a key is a regular
            expression for the end of the path (``"down_proj"``, ``"layers.0.*q_proj"``) or, after ``^``, for
            all of it; the first that matches wins.
        alpha_pattern: The same for ``alpha``.

    Raises:
        ConfigError: A value makes no sense.
    """

    r: int = 8
    alpha: float = 16.0
    scaling: str = "lora"
    dropout: float = 0.0
    init: str = "kaiming"
    bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    roles: ClassVar[Mapping[str, str]] = {"lora_A": "A", "lora_B": "B", "lora_bias": "bias"}

    def __post_init__(self) -> None:
        for r in (self.r, *self.rank_pattern.values()):
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                raise ConfigError(f"The rank must be a whole number of at least 1; got r={r!r}.")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
                raise ConfigError(f"alpha must be a finite number; got {alpha!r}.")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is a probability in [0, 1); got {self.dropout!r}.")
        for what, value, known in (("scaling", self.scaling, SCALINGS), ("init", self.init, INITS)):
            if value not in known:
                raise ConfigError(
                    f"No {what} is called {value!r}.{near_matches(value, known)} Known: {sorted(known)}."
                )

    @property
    def scale(self) -> float:
        """The factor on ``B A``."""
        return SCALINGS[self.scaling](self.alpha, self.r)

    @property
    def input_dropout(self) -> float:
        """See ``dropout``."""
        return self.dropout

    def for_path(self, path: str) -> LoRA:
        """This LoRA with the rank and alpha that the patterns give one target."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        r = next((r for key, r in self.rank_pattern.items() if pattern_matches(key, path)), self.r)
        alpha = next((a for key, a in self.alpha_pattern.items() if pattern_matches(key, path)), self.alpha)
        return dataclasses.replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def patterns(self) -> tuple[str, ...]:
        """The keys of both patterns."""
        return (*self.rank_pattern, *self.alpha_pattern)

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """``lora_A`` and ``lora_B``; with ``bias`` also ``lora_bias``."""
        sizes = {"lora_A": (*shape.batch, self.r, shape.in_), "lora_B": (*shape.batch, shape.out, self.r)}
        if self.bias:
            sizes["lora_bias"] = (math.prod(shape.batch) * shape.out,)
        return sizes

    def start(
        self, target: Target, generator: torch.Generator | None, shared: Tensors
    ) -> dict[str, Tensor]:
        """Factors whose product is zero.

        Raises:
            ConfigError: The rank exceeds what a matrix of this size can have.
        """
        most = min(target.out, target.in_)
        if self.r > most:
            raise ConfigError(
                f"r={self.r} is more than a {target.shape} matrix can have at {target.path!r}: its rank is "
                f"at most {most}. "
                f"Choose r <= {most}, give this target its own rank "
                f"(rank_pattern={{{target.path!r}: {most}}}), or exclude it."
            )
        A, B = INITS[self.init](target, self.r, generator)
        tensors = {"lora_A": A, "lora_B": B}
        if self.bias:
            tensors["lora_bias"] = torch.zeros(self.shapes(target.shape)["lora_bias"])
        return tensors

    def factors(self, target: Target | Shape, p: Tensors) -> Factors:
        """``A``, ``B`` and ``alpha / r`` or ``alpha / sqrt(r)``."""
        return Factors(p["lora_A"], p["lora_B"], self.scale)

    def bias_delta(self, target: Target, p: Tensors) -> Tensor | None:
        """``s lora_bias``."""
        return p["lora_bias"] * self.scale if self.bias else None

    def add_to(
        self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, weight: float = 1.0, training: bool = False
    ) -> Tensor:
        """The fused product, and the bias."""
        scale = self.scale * weight
        y = target.add_low_rank(y, x, p["lora_A"], p["lora_B"], scale, self.dropout if training else 0.0)
        return target.scale_add_bias(y, p["lora_bias"], scale) if self.bias else y

    def supports(self, target: Target) -> str | None:
        """Dropout and bias need a layer whose call can be hooked."""
        if target.binding == "parameter":
            if self.dropout:
                return "its layer reads the weight directly, so there is no input to drop: use dropout=0"
            if self.bias:
                return "it is a bare weight with no bias of its own: use bias=False"
        if self.bias and target.shape.kind not in ("linear", "conv"):
            return f"bias=True needs a linear or convolution layer, not an {target.shape.kind}"
        return None
