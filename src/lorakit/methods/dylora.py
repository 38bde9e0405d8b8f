"""DyLoRA: a LoRA that is trained for every rank up to ``r`` at once, ``W = W0 + (alpha / b) B[:, :b] A[:b]``.

Source: Valipour et al. 2022 (arXiv 2210.07558), section 4 and the authors' code, in which the scale of rank ``b`` is
that of a plain LoRA of rank ``b``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.core.method import Factors, LowRankMethod, Tensors
from lorakit.core.process import Site, TrainingProcess
from lorakit.core.registry import register
from lorakit.core.target import Shape, Target
from lorakit.errors import ConfigError
from lorakit.methods.init import init_called
from lorakit.methods.lora import LoRA
from lorakit.methods.settings import (
    check_alpha,
    check_dropout,
    check_rank,
    check_rank_fits,
    no_input_to_drop,
)

ACTIVE, TRAINED = "dylora_active", "dylora_trained"


@register("dylora")
@dataclass(frozen=True)
class DyLoRA(LowRankMethod):
    """Dynamic search-free LoRA: train once, then cut to any rank (`lorakit.adapters.truncate`).

    Parameters per target: ``lora_A`` ``(*batch, r, in)`` and ``lora_B`` ``(*batch, out, r)``, as LoRA's. All targets
    share two vectors of ``r`` zeros and ones that are not trained: ``dylora_active``, the directions that act, and
    ``dylora_trained``, those that get a gradient. They are all ones, and the adapter is a LoRA of rank ``r``, but for
    the steps of a training loop that runs the process of `lorakit.training_processes` (``lorakit train`` does): it
    draws a rank for each step, the same for all targets.

    Attributes:
        r: The highest rank.
        alpha: The numerator of the scale ``alpha / b`` at rank ``b``.
        frozen_below: Train only direction ``b`` in a step of rank ``b`` and leave those below as they are, as the
            authors do; otherwise the first ``b`` are all trained.
        dropout: Probability of dropping an entry of the input on the way to ``A``, in training.
        seed: Of the drawn ranks.

    Raises:
        ConfigError: A value makes no sense.
    """

    r: int = 8
    alpha: float = 16.0
    frozen_below: bool = True
    dropout: float = 0.0
    seed: int = 0

    roles: ClassVar[Mapping[str, str]] = {"lora_A": "A", "lora_B": "B"}

    def __post_init__(self) -> None:
        check_rank(self.r)
        check_alpha(self.alpha)
        check_dropout(self.dropout)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed is a whole number; got {self.seed!r}.")

    @property
    def frozen(self) -> frozenset[str]:
        """The two vectors that say what acts."""
        return frozenset((ACTIVE, TRAINED))

    @property
    def input_dropout(self) -> float:
        """See ``dropout``."""
        return self.dropout

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """``lora_A`` and ``lora_B``."""
        return {"lora_A": (*shape.batch, self.r, shape.in_), "lora_B": (*shape.batch, shape.out, self.r)}

    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """``dylora_active`` and ``dylora_trained``, ``(r,)``."""
        return {ACTIVE: (self.r,), TRAINED: (self.r,)}

    def check_start(self, target: Target) -> None:
        """The rank must be one that a matrix of this size can have."""
        check_rank_fits(self.r, target)

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """Factors whose product is zero, as LoRA's."""
        A, B = init_called("kaiming").factors(target, self.r, 1.0, generator)
        return {"lora_A": A, "lora_B": B}

    def start_shared(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Everything acts and is trained."""
        return {name: torch.ones(size) for name, size in self.shared_shapes().items()}

    def factors(self, target: Target | Shape, p: Tensors) -> Factors:
        """``A`` and ``(alpha / b) B diag(active)`` with ``b`` active directions."""
        A, B = p["lora_A"], p["lora_B"]
        if self.frozen_below and torch.is_grad_enabled():
            trained = p[TRAINED] != 0
            A = torch.where(trained.unsqueeze(-1), A, A.detach())
            B = torch.where(trained, B, B.detach())
        active = p[ACTIVE].to(torch.promote_types(B.dtype, torch.float32))
        return Factors(A, B * (active * (self.alpha / active.sum())).to(B.dtype), 1.0)

    def along_rows(self, shape: Shape) -> Mapping[str, int] | None:
        """``B``."""
        return {"lora_B": -2}

    def plain(self, shape: Shape, tensors: Tensors) -> tuple[LoRA, Tensors]:
        """The LoRA of rank ``r`` that it is outside training; for other ranks see `lorakit.adapters.truncate`."""
        active = tensors[ACTIVE]
        B = tensors["lora_B"] * (active * (self.r / active.sum())).to(tensors["lora_B"].dtype)
        return LoRA(self.r, self.alpha, dropout=self.dropout), {"lora_A": tensors["lora_A"], "lora_B": B}

    def supports(self, target: Target) -> str | None:
        """Every matrix; dropout needs a layer whose call can be hooked."""
        return no_input_to_drop(target, self.dropout)

    def process(self, sites: Sequence[Site], total_steps: int) -> TrainingProcess:
        """What draws the ranks."""
        return RankDraw(self.r, self.seed, [(s.parameters[ACTIVE], s.parameters[TRAINED]) for s in sites])


class RankDraw(TrainingProcess):
    """Trains each step at a rank drawn uniformly from ``1..r``; between steps the whole adapter acts.

    Attributes:
        rank: The rank of the running or last step.
    """

    def __init__(self, r: int, seed: int, vectors: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
        self.rank = self._r = r
        # The targets on one device share their vectors.
        self._vectors = list({id(active): (active, trained) for active, trained in vectors}.values())
        self._generator = torch.Generator().manual_seed(seed)

    def before_forward(self, step: int) -> None:
        """Draw the rank of the step."""
        self.rank = int(torch.randint(1, self._r + 1, (), generator=self._generator))
        self._set(slice(0, self.rank), slice(self.rank - 1, self.rank))

    def after_step(self, step: int) -> None:
        """Let the whole adapter act, so that an evaluation or a checkpoint between two steps sees all of it."""
        self._set(slice(None), slice(None))

    def finish(self) -> None:
        """The same."""
        self._set(slice(None), slice(None))

    def state_dict(self) -> dict[str, Any]:
        """The state of the draw."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self._generator.set_state(state["generator"].cpu())

    @torch.no_grad()
    def _set(self, active: slice, trained: slice) -> None:
        for vector, rows in (
            (v, s) for pair in self._vectors for v, s in zip(pair, (active, trained), strict=True)
        ):
            vector.zero_()
            vector[rows] = 1
