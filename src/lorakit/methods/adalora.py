"""AdaLoRA: ``W = W0 + s B diag(E) A``, whose rank moves between targets while it is trained.

Source: Zhang et al. 2023 (arXiv 2303.10512), equations 3 to 12; the authors' code for the scale and the start. How the
ranks are moved stands in `lorakit.methods.adalora_allocator`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lorakit.core.method import Factors, LowRankMethod, Tensors
from lorakit.core.process import Site, TrainingProcess
from lorakit.core.registry import register
from lorakit.core.target import Shape, Target
from lorakit.errors import ConfigError
from lorakit.methods.adalora_allocator import BudgetSchedule, RankAllocator, Triplets
from lorakit.methods.settings import (
    check_alpha,
    check_dropout,
    check_rank,
    check_rank_fits,
    no_input_to_drop,
)

Regulariser = Literal["norm", "squared"]


@register("adalora")
@dataclass(frozen=True)
class AdaLoRA(LowRankMethod):
    """Adaptive budget allocation: start every target at ``init_r``, end at ``target_r`` on average.

    Parameters per target, named as in PEFT: ``lora_A`` ``(*batch, r, in)``, ``lora_B`` ``(*batch, out, r)`` and
    ``lora_E`` ``(*batch, r, 1)``, the singular values: ``r (in + out + 1)`` numbers a matrix, with ``r`` the initial
    rank until `compact` leaves the pruned triplets out. The scale is ``alpha / (init_r + 1e-5)`` throughout.

    The ranks move only if the training loop runs the process that `lorakit.training_processes` gives
    (``lorakit train`` does). Steps below count from 0.

    Attributes:
        init_r: Rank of every matrix at the start.
        target_r: Average rank of a matrix at the end.
        alpha: The numerator of the scale.
        tinit: Steps before the budget falls; by default a fifth of those before the final phase.
        tfinal: Steps at the end with the final ranks, at least 1; by default half of those after ``tinit``.
        deltaT: While the budget falls, triplets are masked in every ``deltaT``-th step; between, they may revive.
        beta1: Decay of the average of the sensitivity.
        beta2: Decay of the average of its uncertainty.
        orth_reg_weight: Weight of the penalty that keeps the columns of ``B`` and the rows of ``A`` orthonormal.
        orth_reg: ``"norm"``, the mean of ``|BᵀB - I|`` and ``|AAᵀ - I|`` over all matrices (the authors' code, PEFT);
            ``"squared"``, the mean of their squares (the paper, which sums them).
        dropout: Probability of dropping an entry of the input on the way to ``A``, in training.
        kept_r: Rank that a finished target has kept, from 0; None as long as it has ``init_r``.

    Raises:
        ConfigError: A value makes no sense.
    """

    init_r: int = 12
    target_r: int = 8
    alpha: float = 8.0
    tinit: int | None = None
    tfinal: int | None = None
    deltaT: int = 1  # noqa: N815 - its name in the paper and in PEFT
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    orth_reg: Regulariser = "norm"
    dropout: float = 0.0
    kept_r: int | None = None

    roles: ClassVar[Mapping[str, str]] = {"lora_A": "A", "lora_B": "B", "lora_E": "singular values"}

    def __post_init__(self) -> None:
        check_rank(self.init_r, "init_r")
        check_rank(self.target_r, "target_r")
        if self.target_r > self.init_r:
            raise ConfigError(
                f"AdaLoRA ends at target_r={self.target_r} and cannot start below it; got init_r={self.init_r}. "
                "The authors start at 1.5 times the target."
            )
        if self.kept_r is not None and not 0 <= self.kept_r <= self.init_r:
            raise ConfigError(f"kept_r lies between 0 and init_r={self.init_r}; got {self.kept_r}.")
        check_alpha(self.alpha)
        if self.alpha <= 0:
            raise ConfigError(
                f"alpha must be positive; got {self.alpha!r}. (The authors' code reads that as alpha = init_r.)"
            )
        for name, least in (("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            steps = getattr(self, name)
            if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < least):
                raise ConfigError(f"{name} counts steps, at least {least}; got {steps!r}.")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} lies between 0 and 1; got {getattr(self, name)!r}.")
        if not self.orth_reg_weight >= 0:
            raise ConfigError(f"orth_reg_weight must be at least 0; got {self.orth_reg_weight!r}.")
        if self.orth_reg not in get_args(Regulariser):
            raise ConfigError(f"orth_reg is 'norm' or 'squared'; got {self.orth_reg!r}.")
        check_dropout(self.dropout)

    @property
    def rank(self) -> int:
        """The rank at present."""
        return self.init_r if self.kept_r is None else self.kept_r

    @property
    def scale(self) -> float:
        """``alpha / (init_r + 1e-5)``: pruning does not change it, so that what is kept acts as it was trained."""
        return self.alpha / (self.init_r + 1e-5)

    @property
    def input_dropout(self) -> float:
        """See ``dropout``."""
        return self.dropout

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """``lora_A``, ``lora_B`` and ``lora_E``."""
        return {
            "lora_A": (*shape.batch, self.rank, shape.in_),
            "lora_B": (*shape.batch, shape.out, self.rank),
            "lora_E": (*shape.batch, self.rank, 1),
        }

    def check_start(self, target: Target) -> None:
        """The rank must be one that a matrix of this size can have."""
        check_rank_fits(self.rank, target, "init_r")

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """``A`` and ``B`` from ``N(0, 0.02²)``, ``E = 0``."""
        sizes = self.shapes(target.shape)
        A = torch.empty(sizes["lora_A"]).normal_(std=0.02, generator=generator)
        B = torch.empty(sizes["lora_B"]).normal_(std=0.02, generator=generator)
        if target.padding is not None:  # its column gets no gradient, so it stays zero
            A[..., target.padding] = 0
        return {"lora_A": A, "lora_B": B, "lora_E": torch.zeros(sizes["lora_E"])}

    def factors(self, target: Target | Shape, p: Tensors) -> Factors:
        """``A``, ``B diag(E)`` and the scale."""
        return Factors(p["lora_A"], p["lora_B"] * p["lora_E"].mT, self.scale)

    def along_rows(self, shape: Shape) -> Mapping[str, int] | None:
        """``B``."""
        return {"lora_B": -2}

    def fold(self, target: Target, p: Tensors, W: Tensor, base: Tensor, weight: float) -> Tensor:
        """``W + weight * s B diag(E) A``; of rank 0, ``W`` itself."""
        return super().fold(target, p, W, base, weight) if self.rank else W

    def add_to(
        self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, weight: float = 1.0, training: bool = False
    ) -> Tensor:
        """The fused low-rank product; of rank 0, nothing."""
        return super().add_to(target, p, x, y, weight=weight, training=training) if self.rank else y

    def supports(self, target: Target) -> str | None:
        """Every matrix; dropout needs a layer whose call can be hooked."""
        return no_input_to_drop(target, self.dropout)

    def process(self, sites: Sequence[Site], total_steps: int) -> TrainingProcess:
        """What moves the ranks.

        Raises:
            ConfigError: The schedule does not fit into the training, or differs between targets.
        """
        method = _one_schedule(sites)
        triplets = [Triplets.of(site.path, site.parameters) for site in sites]
        schedule = BudgetSchedule.fitted(
            start=sum(t.number for t in triplets),
            end=sum(s.method.target_r * t.matrices for s, t in zip(sites, triplets, strict=True)),  # type: ignore[attr-defined]
            total_steps=total_steps,
            tinit=method.tinit,
            tfinal=method.tfinal,
            deltaT=method.deltaT,
        )
        return RankAllocator(
            triplets,
            schedule,
            beta1=method.beta1,
            beta2=method.beta2,
            orth_reg_weight=method.orth_reg_weight,
            squared=method.orth_reg == "squared",
        )

    def compact(self, shape: Shape, tensors: Tensors) -> tuple[AdaLoRA, Tensors]:
        """Without the triplets whose singular value is zero; the scale stays, so the change is the same.

        In a stack of matrices all keep as many as the one that has most, so some zeros may remain. Triplets left out
        cannot revive: what is to be trained on with a falling budget is kept whole.
        """
        pruned = tensors["lora_E"].squeeze(-1) == 0
        kept_r = int((~pruned).sum(-1).max())
        order = pruned.to(torch.uint8).argsort(dim=-1, stable=True)[..., :kept_r]
        rows = order.unsqueeze(-1)
        compacted = {
            "lora_A": tensors["lora_A"].gather(-2, rows.expand(*rows.shape[:-1], shape.in_)),
            "lora_B": tensors["lora_B"].gather(-1, rows.mT.expand(*rows.shape[:-2], shape.out, kept_r)),
            "lora_E": tensors["lora_E"].gather(-2, rows),
        }
        return dataclasses.replace(self, kept_r=kept_r), compacted


def _one_schedule(sites: Sequence[Site]) -> AdaLoRA:
    """The settings that all targets of one budget must agree on."""
    of: dict[AdaLoRA, str] = {}
    for site in sites:
        method = site.method
        assert isinstance(method, AdaLoRA)
        alike = dataclasses.replace(method, init_r=1, target_r=1, alpha=1.0, dropout=0.0, kept_r=None)
        of.setdefault(alike, site.path)
    if len(of) > 1:
        (_, one), (_, other), *_ = of.items()
        raise ConfigError(
            f"The targets of one adapter share one budget, but {one!r} and {other!r} differ in its schedule: give "
            "them the same tinit, tfinal, deltaT, betas and regulariser (init_r, target_r and alpha may differ)."
        )
    return next(iter(of))
