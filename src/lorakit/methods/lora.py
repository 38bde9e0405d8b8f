"""LoRA: ``W = W0 + s B A`` with ``s = alpha / r`` or, as rsLoRA, ``s = alpha / sqrt(r)``.

Sources: Hu et al. 2021 (arXiv 2106.09685), section 4.1; Kalajdzievski 2023 (arXiv 2312.03732) for rsLoRA.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.core.mapping import FixedMapping
from lorakit.core.method import Factors, LowRankMethod, Method, Tensors
from lorakit.core.registry import register
from lorakit.core.target import Shape, Target
from lorakit.methods.init import init_called
from lorakit.methods.ranked import Ranked
from lorakit.methods.settings import check_choice, check_dropout, check_rank_fits, no_input_to_drop
from lorakit.ops import joined

SCALINGS: Mapping[str, Callable[[float, int], float]] = {
    "lora": lambda alpha, r: alpha / r,
    "rslora": lambda alpha, r: alpha / math.sqrt(r),
}


@register("lora")
@dataclass(frozen=True)
class LoRA(Ranked, LowRankMethod):
    """Low-rank adaptation of a dense layer.

    Parameters per target: ``lora_A`` ``(*batch, r, in)``, ``lora_B`` ``(*batch, out, r)``: ``r (in + out)``
    numbers a matrix; with ``bias``, ``lora_bias`` ``(out,)``. With a subtracted start (PiSSA, OLoRA, LoRA-GA) also
    ``start_A`` and ``start_B`` of the same sizes, which are not trained: the change is ``s (B A - B_0 A_0)``, and the
    base stays as it is.

    Attributes:
        r: The rank of the change.
        alpha: The numerator of the scale; with Adam it acts like a factor on the learning rate.
        scaling: ``"lora"`` for ``alpha / r``, ``"rslora"`` for ``alpha / sqrt(r)``, which keeps the size of the change
            from falling as ``r`` grows.
        dropout: Probability of dropping an entry of the input on the way to ``A``, in training.
        init: ``"kaiming"`` (loralib, PEFT), ``"gaussian"`` (the paper, diffusers), ``"orthogonal"``; ``"pissa"``,
            ``"pissa_niter_4"`` (fast), ``"olora"``; from data ``"eva"`` (see `lorakit.eva`) and ``"lora_ga"`` (see
            `lorakit.lora_ga`). The change starts at zero with every one.
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
    rank_pattern: Mapping[str, int] = field(default_factory=FixedMapping)
    alpha_pattern: Mapping[str, float] = field(default_factory=FixedMapping)

    roles: ClassVar[Mapping[str, str]] = {
        "lora_A": "A",
        "lora_B": "B",
        "start_A": "A",
        "start_B": "B",
        "lora_bias": "bias",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropout(self.dropout)
        check_choice("scaling", self.scaling, SCALINGS)
        init_called(self.init)

    @cached_property
    def scale(self) -> float:
        """The factor on ``B A``."""
        return SCALINGS[self.scaling](self.alpha, self.r)

    @property
    def input_dropout(self) -> float:
        """See ``dropout``."""
        return self.dropout

    @cached_property
    def subtracted(self) -> bool:
        """Whether the change is measured from the start, which is then kept beside the factors."""
        return init_called(self.init).subtracted

    @property
    def frozen(self) -> frozenset[str]:
        """A subtracted start."""
        return frozenset({"start_A", "start_B"} if self.subtracted else ())

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """``lora_A`` and ``lora_B``; where it is subtracted also their start; with ``bias`` also ``lora_bias``."""
        A, B = (*shape.batch, self.r, shape.in_), (*shape.batch, shape.out, self.r)
        sizes: dict[str, tuple[int, ...]] = {"lora_A": A, "lora_B": B}
        if self.subtracted:
            sizes |= {"start_A": A, "start_B": B}
        if self.bias:
            sizes["lora_bias"] = (math.prod(shape.batch) * shape.out,)
        return sizes

    def check_start(self, target: Target) -> None:
        """The rank must be one that a matrix of this size can have; EVA lowers it by itself."""
        if not init_called(self.init).lowers_rank:
            check_rank_fits(self.r, target, by_pattern=True)

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """Factors whose product is zero, or that are subtracted.

        Raises:
            ConfigError: The init needs data or another rank.
        """
        A, B = init_called(self.init).factors(target, self.r, self.scale, generator)
        tensors = {"lora_A": A, "lora_B": B}
        if self.subtracted:
            tensors |= {"start_A": A.clone(), "start_B": B.clone()}
        if self.bias:
            tensors["lora_bias"] = torch.zeros(self.shapes(target.shape)["lora_bias"])
        return tensors

    def factors(self, target: Target | Shape, p: Tensors) -> Factors:
        """``A``, ``B`` and ``alpha / r`` or ``alpha / sqrt(r)``; twice as many rows and columns for a subtracted start.

        ``B A - B_0 A_0`` is written as ``[B - B_0, B_0] [A; A - A_0]``: nothing large cancels, and at the start the
        product is exactly zero in every dtype.
        """
        A, B = p["lora_A"], p["lora_B"]
        if self.subtracted:
            A0, B0 = p["start_A"], p["start_B"]
            A, B = joined(A, A - A0, -2), joined(B - B0, B0, -1)
        return Factors(A, B, self.scale)

    def along_rows(self, shape: Shape) -> Mapping[str, int] | None:
        """``B``, and its start where that is subtracted."""
        return {"lora_B": -2, "start_B": -2} if self.subtracted else {"lora_B": -2}

    def plain(self, shape: Shape, tensors: Tensors) -> tuple[Method, Tensors]:
        """A subtracted start as a LoRA of twice the rank, with the alpha that leaves the scale as it is."""
        if not self.subtracted:
            return self, tensors
        A, B, _ = self.factors(shape, tensors)
        per_alpha = SCALINGS[self.scaling]
        alpha = self.alpha * (per_alpha(1.0, self.r) / per_alpha(1.0, 2 * self.r))
        kept = {name: t for name, t in tensors.items() if name not in self.frozen}
        lora = dataclasses.replace(self, r=2 * self.r, alpha=alpha, init="kaiming")
        return lora, {**kept, "lora_A": A, "lora_B": B}

    def bias_delta(self, target: Target, p: Tensors) -> Tensor | None:
        """``s lora_bias``."""
        return p["lora_bias"] * self.scale if self.bias else None

    def forward(self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
        """``add_to`` with weight one; in the usual case two calls less for every layer and token."""
        if self.bias or self.subtracted:
            return self.add_to(target, p, x, y, training=training)
        dropout = self.dropout if training else 0.0
        return target.add_low_rank(y, x, p["lora_A"], p["lora_B"], self.scale, dropout)

    def added_product(self, target: Target, p: Tensors, *, training: bool = False) -> Factors | None:
        """The factors, without a bias or dropout."""
        return None if self.bias or (training and self.dropout) else self.factors(target, p)

    def add_to(
        self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, weight: float = 1.0, training: bool = False
    ) -> Tensor:
        """The fused product, and the bias."""
        A, B, scale = self.factors(target, p)
        y = target.add_low_rank(y, x, A, B, scale * weight, self.dropout if training else 0.0)
        return target.scale_add_bias(y, p["lora_bias"], scale * weight) if self.bias else y

    def supports(self, target: Target) -> str | None:
        """Dropout and bias need a layer whose call can be hooked."""
        reason = no_input_to_drop(target, self.dropout)
        if reason is not None:
            return reason
        if self.bias and target.binding == "parameter":
            return "it is a bare weight with no bias of its own: use bias=False"
        if self.bias and target.shape.kind not in ("linear", "conv"):
            return f"bias=True needs a linear or convolution layer, not an {target.shape.kind}"
        return None
