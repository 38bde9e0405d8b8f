"""LoHa: ``W = W0 + s (B1 A1) ∘ (B2 A2)``, the Hadamard product of two low-rank products, of rank up to ``r²``.

Sources: Yeh et al. 2023 (arXiv 2309.14859, LyCORIS); Hyeon-Woo et al. 2021 (arXiv 2108.06098, FedPara), proposition 1,
and proposition 3 for the Tucker form of convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.method import Tensors
from lorakit.core.registry import register
from lorakit.core.target import Shape, Target
from lorakit.methods.init.uniform import fan_in_uniform
from lorakit.methods.ranked import RankedMethod
from lorakit.methods.settings import check_choice, check_rank_fits
from lorakit.ops import hadamard_low_rank, own_precision

INITS = ("peft", "lycoris")


@register("loha")
@dataclass(frozen=True)
class LoHa(RankedMethod):
    """Low-rank adaptation with a Hadamard product.

    Parameters per target, with LyCORIS's names: ``hada_w1_a``, ``hada_w2_a`` ``(*batch, out, r)`` (the formula's ``B``)
    and ``hada_w1_b``, ``hada_w2_b`` ``(*batch, r, in)`` (its ``A``): ``2 r (in + out)`` numbers a matrix. The kernel of
    a convolution is unfolded to such a matrix.

    Attributes:
        r: The rank of each product; that of the change is at most its square.
        alpha: The numerator of the scale ``alpha / r``.
        rank_pattern: Another rank for the targets whose path matches a key, as in PEFT: a key is a regular
            expression for the end of the path or, after ``^``, for all of it; the first that matches wins.
        alpha_pattern: The same for ``alpha``.
        init: ``"peft"``: three factors Kaiming-uniform, ``hada_w2_b`` zero. ``"lycoris"``: three Gaussian,
            ``hada_w2_a`` zero.
        tucker: Where a kernel is larger than one, factor it by channels and not by unfolded columns: cores ``hada_t1``,
            ``hada_t2`` ``(*batch, r, r, *kernel)`` between ``hada_w1_a``, ``hada_w2_a`` ``(*batch, r, out)`` and
            ``hada_w1_b``, ``hada_w2_b`` ``(*batch, r, channels)``. PEFT's ``use_effective_conv2d``.

    Raises:
        ConfigError: A value makes no sense.
    """

    init: str = "peft"
    tucker: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init of LoHa", self.init, INITS)

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Two pairs of factors; in the Tucker form also two cores."""
        r, stack = self.r, shape.batch
        sizes: dict[str, tuple[int, ...]] = {}
        for k in ("1", "2"):
            if self._has_cores(shape):
                sizes[f"hada_t{k}"] = (*stack, r, r, *shape.kernel)
                sizes[f"hada_w{k}_a"] = (*stack, r, shape.out)
                sizes[f"hada_w{k}_b"] = (*stack, r, shape.channels)
            else:
                sizes[f"hada_w{k}_a"] = (*stack, shape.out, r)
                sizes[f"hada_w{k}_b"] = (*stack, r, shape.in_)
        return sizes

    def check_start(self, target: Target) -> None:
        """The rank must be one that a matrix of this size can have."""
        check_rank_fits(self.r, target, by_pattern=True)

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """Factors of which one is zero, so that the product is."""
        sizes, stack = self.shapes(target.shape), len(target.batch)
        if self.init == "peft":
            zero = "hada_w2_b"
            started = {name: fan_in_uniform(size, generator, stack=stack) for name, size in sizes.items()}
        else:
            zero = "hada_w2_a"
            started = {
                name: torch.empty(size).normal_(std=1.0 if name.endswith("_b") else 0.1, generator=generator)
                for name, size in sizes.items()
            }
        started[zero] = torch.zeros(sizes[zero])
        if target.padding is not None:  # its column gets no gradient, so it stays zero
            started["hada_w2_b"][..., target.padding] = 0
        return started

    def delta(self, target: Target, p: Tensors) -> Tensor:
        """``s (B1 A1) ∘ (B2 A2)``; autocast does not round the products inside."""
        with own_precision(p["hada_w1_a"]):
            return hadamard_low_rank(*self._pair(p, "1"), *self._pair(p, "2"), self.scale)

    def along_rows(self, shape: Shape) -> Mapping[str, int] | None:
        """Both ``B``; in the Tucker form these lie the other way round."""
        return dict.fromkeys(("hada_w1_a", "hada_w2_a"), -1 if self._has_cores(shape) else -2)

    def _pair(self, p: Tensors, k: str) -> tuple[Tensor, Tensor]:
        """``B`` ``(*batch, out, r)`` and ``A`` ``(*batch, r, in)`` of one product."""
        B, A = p[f"hada_w{k}_a"], p[f"hada_w{k}_b"]
        core = p.get(f"hada_t{k}")
        return (B, A) if core is None else (B.mT, unfold_core(core, A))

    def _has_cores(self, shape: Shape) -> bool:
        return self.tucker and math.prod(shape.kernel) > 1


def unfold_core(core: Tensor, channels: Tensor) -> Tensor:
    """The columns of a Tucker form: ``A[i, c, k] = sum_j core[i, j, k] channels[j, c]``, unfolded to ``(r, in)``.

    Args:
        core: ``(*batch, r, r, *kernel)``.
        channels: ``(*batch, r, c)``.

    Returns:
        ``(*batch, r, c * prod(kernel))``.
    """
    flat = core.flatten(channels.dim())  # (*batch, r, r, positions)
    return (channels.mT.unsqueeze(-3) @ flat).flatten(-2)
