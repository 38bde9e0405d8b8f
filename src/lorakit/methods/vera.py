"""VeRA: ``W = W0 + diag(b) B diag(d) A`` with ``A`` and ``B`` random, frozen and shared by all targets.

Source: Kopiczko et al. 2023 (arXiv 2310.11454), equation 2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.core.method import Factors, LowRankMethod, Tensors
from lorakit.core.registry import register
from lorakit.core.target import Shape, Target
from lorakit.errors import ConfigError
from lorakit.methods.init.uniform import fan_in_uniform
from lorakit.methods.settings import check_dropout, check_rank, no_input_to_drop


@register("vera")
@dataclass(frozen=True)
class VeRA(LowRankMethod):
    """Vector-based random matrix adaptation: two trained vectors a target between frozen random projections.

    Shared by all targets of an adapter: ``vera_A`` ``(r, max_in)`` and ``vera_B`` ``(max_out, r)``, of which a smaller
    target takes the first columns and rows. Parameters per target: ``vera_lambda_d`` ``(*batch, r)`` and
    ``vera_lambda_b`` ``(*batch, out)``.

    Attributes:
        r: The rank; as only ``r + out`` numbers a target are trained, it is chosen large.
        d_initial: Where ``vera_lambda_d`` starts; ``vera_lambda_b`` starts at zero.
        projection_seed: Of the shared projections. The same seed and sizes give the same numbers, also in PEFT, which
            calls it ``projection_prng_key``.
        dropout: Probability of dropping an entry of the input on the way to ``A``, in training.
        max_in: Columns of ``vera_A``; 0 for as many as the widest target has.
        max_out: Rows of ``vera_B``; 0 for as many as the tallest target has.

    Raises:
        ConfigError: A value makes no sense.
    """

    r: int = 256
    d_initial: float = 0.1
    projection_seed: int = 0
    dropout: float = 0.0
    max_in: int = 0
    max_out: int = 0

    roles: ClassVar[Mapping[str, str]] = {"vera_lambda_d": "A", "vera_lambda_b": "B"}

    def __post_init__(self) -> None:
        check_rank(self.r)
        if (
            not isinstance(self.d_initial, (int, float))
            or not math.isfinite(self.d_initial)
            or not self.d_initial
        ):
            raise ConfigError(
                f"d_initial must be a finite number other than 0, else no gradient reaches b; got {self.d_initial!r}."
            )
        check_dropout(self.dropout)
        for what in ("projection_seed", "max_in", "max_out"):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{what} must be a whole number of at least 0; got {value!r}.")

    @property
    def frozen(self) -> frozenset[str]:
        """The projections."""
        return frozenset({"vera_A", "vera_B"})

    @property
    def input_dropout(self) -> float:
        """See ``dropout``."""
        return self.dropout

    def for_targets(self, shapes: Mapping[str, Shape]) -> VeRA:
        """This VeRA with projections for the largest of the targets."""
        return dataclasses.replace(
            self,
            max_in=self.max_in or max(shape.in_ for shape in shapes.values()),
            max_out=self.max_out or max(shape.out for shape in shapes.values()),
        )

    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """``vera_A`` ``(r, max_in)`` and ``vera_B`` ``(max_out, r)``."""
        return {"vera_A": (self.r, self.max_in), "vera_B": (self.max_out, self.r)}

    def start_shared(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Kaiming-uniform projections from ``projection_seed``, whatever the ``generator``."""
        own = torch.Generator(device="cpu").manual_seed(self.projection_seed)
        return {
            name: fan_in_uniform(size, own, gain=math.sqrt(2)) for name, size in self.shared_shapes().items()
        }

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """``vera_lambda_d`` and ``vera_lambda_b``."""
        return {"vera_lambda_d": (*shape.batch, self.r), "vera_lambda_b": (*shape.batch, shape.out)}

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """``d`` constant, ``b`` zero."""
        sizes = self.shapes(target.shape)
        return {
            "vera_lambda_d": torch.full(sizes["vera_lambda_d"], float(self.d_initial), dtype=torch.float32),
            "vera_lambda_b": torch.zeros(sizes["vera_lambda_b"]),
        }

    def factors(self, target: Target | Shape, p: Tensors) -> Factors:
        """The first columns of ``A`` as they are, and the first rows of ``B`` with both vectors on them.

        With ``d`` on the columns of ``B`` the forward pass scales one matrix and not two, and the backward pass makes
        no product of the size of ``A``.
        """
        d, b = p["vera_lambda_d"], p["vera_lambda_b"]
        A = p["vera_A"][:, : target.in_].expand(*target.batch, self.r, target.in_)
        B = p["vera_B"][: target.out] * (b.unsqueeze(-1) * d.unsqueeze(-2))
        return Factors(A, B, 1.0)

    def along_rows(self, shape: Shape) -> Mapping[str, int] | None:
        """``B`` and the vector on its rows."""
        return {"vera_B": -2, "vera_lambda_b": -1}

    def supports(self, target: Target) -> str | None:
        """What fits into the projections; dropout needs a layer whose call can be hooked."""
        for what, size, most in (("columns", target.in_, self.max_in), ("rows", target.out, self.max_out)):
            if 0 < most < size:
                return (
                    f"it has {size} {what} and the shared projections are made for {most}: raise "
                    f"{'max_in' if what == 'columns' else 'max_out'}, or leave it at 0"
                )
        return no_input_to_drop(target, self.dropout)
