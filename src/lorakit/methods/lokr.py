"""LoKr: ``W = W0 + s (W1 ⊗ W2)``, a Kronecker product whose second and larger factor may be a low-rank product.

Source: Yeh et al. 2023 (arXiv 2309.14859, LyCORIS).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.core.method import Tensors
from lorakit.core.registry import register
from lorakit.core.target import Shape, Target
from lorakit.errors import ConfigError
from lorakit.methods.init.uniform import fan_in_uniform
from lorakit.methods.loha import unfold_core
from lorakit.methods.ranked import RankedMethod
from lorakit.methods.settings import check_choice
from lorakit.ops import kronecker

INITS = ("peft", "lycoris")
SCALINGS = ("peft", "lycoris")
FIRSTS = ("smaller", "factor")


@register("lokr")
@dataclass(frozen=True)
class LoKr(RankedMethod):
    """Low-rank adaptation with a Kronecker product: few parameters, and a change that can have full rank.

    ``out = a b`` and ``channels = c d`` are split by `factorize`. Parameters per target, with LyCORIS's names:
    ``lokr_w1`` ``(*batch, a, c)``, or its factors ``lokr_w1_a`` and ``lokr_w1_b``; ``lokr_w2``
    ``(*batch, b, d, *kernel)``, or its factors ``lokr_w2_a`` and ``lokr_w2_b``, in the Tucker form also ``lokr_t2``.

    Attributes:
        r: The rank of a factor that is kept as a low-rank product. ``W2`` is one where ``r < max(b, d) / 2``; where it
            is not, the rank has no meaning but in the scale.
        alpha: The numerator of the scale ``alpha / r``.
        rank_pattern: Another rank for the targets whose path matches a key, as in PEFT: a key is a regular
            expression for the end of the path or, after ``^``, for all of it; the first that matches wins.
        alpha_pattern: The same for ``alpha``.
        factor: How sizes are split, see `factorize`: -1 for the divisors nearest the square root, else one of the two
            is this number where it divides the size.
        first: Which of the two numbers is ``a`` or ``c``, the size of ``W1``: the ``"smaller"`` one (LyCORIS), or
            ``"factor"``, the factor itself where it divides the size (PEFT, which differs where that is the larger).
        decompose_both: Keep ``W1`` too as a low-rank product where ``r < max(a, c) / 2``.
        init: ``"peft"``: ``W1`` zero. ``"lycoris"``: ``W2`` zero. The other one is Kaiming-uniform.
        scaling: ``"peft"`` for ``alpha / r`` everywhere; ``"lycoris"`` for 1 where both factors are full.
        tucker: Where a kernel is larger than one, keep a low-rank ``W2`` by channels: a core ``lokr_t2``
            ``(*batch, r, r, *kernel)`` between ``(*batch, r, b)`` and ``(*batch, r, d)``. PEFT's
            ``use_effective_conv2d``.

    Raises:
        ConfigError: A value makes no sense.
    """

    factor: int = -1
    decompose_both: bool = False
    init: str = "peft"
    scaling: str = "peft"
    tucker: bool = False
    first: str = "smaller"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.factor, bool)
            or not isinstance(self.factor, int)
            or not (self.factor == -1 or self.factor > 0)
        ):
            raise ConfigError(f"factor must be -1 or a whole number of at least 1; got {self.factor!r}.")
        check_choice("init of LoKr", self.init, INITS)
        check_choice("scaling of LoKr", self.scaling, SCALINGS)
        check_choice("first of LoKr", self.first, FIRSTS)

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """``W1`` and ``W2``, each whole or as its factors."""
        (a, b), (c, d) = (factorize(size, self.factor, self.first) for size in (shape.out, shape.channels))
        r, stack, kernel = self.r, shape.batch, shape.kernel
        positions = math.prod(kernel)
        sizes: dict[str, tuple[int, ...]] = {}
        if self.decompose_both and r < max(a, c) / 2:
            sizes |= {"lokr_w1_a": (*stack, a, r), "lokr_w1_b": (*stack, r, c)}
        else:
            sizes |= {"lokr_w1": (*stack, a, c)}
        if r >= max(b, d) / 2:
            sizes |= {"lokr_w2": (*stack, b, d, *kernel)}
        elif self.tucker and positions > 1:
            sizes |= {
                "lokr_t2": (*stack, r, r, *kernel),
                "lokr_w2_a": (*stack, r, b),
                "lokr_w2_b": (*stack, r, d),
            }
        else:
            sizes |= {"lokr_w2_a": (*stack, b, r), "lokr_w2_b": (*stack, r, d * positions)}
        return sizes

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """Kaiming-uniform, but for one tensor that is zero and makes the product zero."""
        sizes, stack = self.shapes(target.shape), len(target.batch)
        started = {name: fan_in_uniform(size, generator, stack=stack) for name, size in sizes.items()}
        zero = ("lokr_w1", "lokr_w1_a") if self.init == "peft" else ("lokr_w2", "lokr_w2_b")
        return {name: torch.zeros_like(t) if name in zero else t for name, t in started.items()}

    def delta(self, target: Target, p: Tensors) -> Tensor:
        """``s (W1 ⊗ W2)``, with the kernel's positions as further columns of ``W2``."""
        return kronecker(*self._scaled_pair(target, p))

    def at_rows(self, shape: Shape, tensors: Tensors, start: int, stop: int) -> tuple[LoKr, Tensors]:
        """The row of each factor that makes each of these rows: ``i // b`` of ``W1``, ``i % b`` of ``W2``."""
        b = factorize(shape.out, self.factor, self.first)[1]
        rows = torch.arange(start, stop, device=next(iter(tensors.values())).device)
        cut = dict(tensors)
        for name in tensors.keys() & {"lokr_w1", "lokr_w1_a"}:
            cut[name] = tensors[name].index_select(-2, rows // b)
        for name in tensors.keys() & {"lokr_w2", "lokr_w2_a"}:
            dim = -1 if name == "lokr_w2_a" and "lokr_t2" in tensors else len(shape.batch)
            cut[name] = tensors[name].index_select(dim, rows % b)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _SomeRows(**fields), cut

    def add_to(
        self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, weight: float = 1.0, training: bool = False
    ) -> Tensor:
        """``y + weight * change``, by the product with the two factors where the layer allows it."""
        W1, W2 = self._scaled_pair(target, p)
        return torch.add(y, target.apply_kronecker(x, W1.to(y.dtype), W2.to(y.dtype)), alpha=weight)

    def _scaled_pair(self, target: Target, p: Tensors) -> tuple[Tensor, Tensor]:
        """``s W1`` ``(*batch, a, c)`` and ``W2`` ``(*batch, b, d * positions)``."""
        W1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
        if "lokr_w2" in p:
            W2 = p["lokr_w2"].flatten(len(target.batch) + 1)
        elif "lokr_t2" in p:
            W2 = p["lokr_w2_a"].mT @ unfold_core(p["lokr_t2"], p["lokr_w2_b"])
        else:
            W2 = p["lokr_w2_a"] @ p["lokr_w2_b"]
        return W1 * self._scale(p), W2

    def _scale(self, p: Tensors) -> float:
        both_full = "lokr_w1" in p and "lokr_w2" in p
        return 1.0 if self.scaling == "lycoris" and both_full else self.scale


@dataclass(frozen=True)
class _SomeRows(LoKr):
    """Some rows of a Kronecker product: each the product of a row of one factor with a row of the other."""

    def delta(self, target: Target, p: Tensors) -> Tensor:
        """``s w1 ⊗ w2`` for each pair of rows."""
        W1, W2 = self._scaled_pair(target, p)
        return (W1.unsqueeze(-1) * W2.unsqueeze(-2)).flatten(-2)


def factorize(size: int, factor: int = -1, first: str = "smaller") -> tuple[int, int]:
    """Two numbers whose product is ``size``.

    Args:
        size: What to split.
        factor: -1 for the divisors nearest the square root. Else one of the two, where it divides ``size``; where it
            does not, the largest divisor up to the square root that does not exceed it.
        first: ``"smaller"``: the first is not the larger one. ``"factor"``: it is the factor, where that divides.
    """
    if factor > 0 and size % factor == 0:
        one = factor
        if first == "factor":
            return one, size // one
    else:
        most = math.isqrt(size) if factor < 0 else min(math.isqrt(size), factor)
        one = next(n for n in range(most, 0, -1) if size % n == 0)
    return min(one, size // one), max(one, size // one)
