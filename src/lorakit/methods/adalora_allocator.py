"""AdaLoRA's training process: the budget of ranks, what each triplet is worth, and which ones survive.

A triplet is a row of ``A``, a column of ``B`` and the singular value between them. After each optimizer step (the
authors' order) the sensitivity ``I = |w g|`` of every number, from the new weight and the gradient that led to it,
enters two averages, of itself and of its spread; a triplet is worth the product of the two, at its singular value and
on average over its row and its column. The best ``b(t)`` triplets over all targets keep their singular values.

Source: Zhang et al. 2023 (arXiv 2303.10512), equations 5 to 12; where paper and authors' code differ, the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.core.process import TrainingProcess
from lorakit.errors import ConfigError, TrainingError
from lorakit.ops import own_precision

NAMES = ("lora_A", "lora_B", "lora_E")


class Triplets(NamedTuple):
    """The live parameters of one target: ``(*batch, r, in)``, ``(*batch, out, r)``, ``(*batch, r, 1)``."""

    path: str
    A: nn.Parameter
    B: nn.Parameter
    E: nn.Parameter

    @classmethod
    def of(cls, path: str, parameters: Mapping[str, nn.Parameter]) -> Triplets:
        """Those of a site."""
        return cls(path, *(parameters[name] for name in NAMES))

    @property
    def number(self) -> int:
        """Triplets of all matrices of the target."""
        return self.E.numel()

    @property
    def matrices(self) -> int:
        """Matrices in the stack."""
        return self.E.shape[:-2].numel()


@dataclass(frozen=True)
class BudgetSchedule:
    """How many triplets may be left after each step, steps counted from 0.

    Attributes:
        start: The budget through step ``tinit``.
        end: The budget from step ``total_steps - tfinal`` on; between, it falls with the third power.
        total_steps: Optimizer steps of the training.
        tinit: The last step with the whole budget.
        tfinal: How long before the end of the training the ranks are final.
        deltaT: Steps between two masks while the budget falls.
    """

    start: int
    end: int
    total_steps: int
    tinit: int
    tfinal: int
    deltaT: int = 1  # noqa: N815 - its name in the paper and in PEFT

    @classmethod
    def fitted(
        cls, *, start: int, end: int, total_steps: int, tinit: int | None, tfinal: int | None, deltaT: int
    ) -> BudgetSchedule:
        """A schedule with what is not given derived from the length of the training.

        Raises:
            ConfigError: No step is left in which the budget could fall, or after it has fallen.
        """
        if end >= start:  # nothing to prune
            return cls(start, start, total_steps, 0, total_steps, deltaT)
        if tfinal == 0:
            raise ConfigError(
                "AdaLoRA with tfinal=0 would train on until the end with triplets that come back between two masks, "
                "and then cut them off: give tfinal of at least 1, or leave it out for half of the training."
            )
        final = max(1, (total_steps - (tinit or 0)) // 2) if tfinal is None else tfinal
        first = max(0, total_steps - final) // 5 if tinit is None else tinit
        if first >= total_steps - final:
            raise ConfigError(
                f"AdaLoRA's tinit={first} and tfinal={final} leave no step of {total_steps} in which ranks could be "
                "moved: make them smaller, or the training longer."
            )
        return cls(start, end, total_steps, first, final, deltaT)

    @property
    def final_step(self) -> int:
        """The step after which the ranks are decided for good."""
        return self.total_steps - self.tfinal

    def budget(self, step: int) -> int:
        """Triplets that may be left after a step."""
        if step <= self.tinit:
            return self.start
        if step >= self.final_step:
            return self.end
        left = 1 - (step - self.tinit) / (self.final_step - self.tinit)
        return int((self.start - self.end) * left**3 + self.end)

    def masks(self, step: int) -> bool:
        """Whether triplets are masked after a step."""
        falling = self.tinit < step < self.final_step
        return step >= self.final_step or (falling and step % self.deltaT == 0)


class RankAllocator(TrainingProcess):
    """Moves the ranks of one adapter while it is trained, and ends exactly at its budget.

    In the middle phase a masked singular value is set to zero and may grow again until the next mask. At
    ``schedule.final_step`` the surviving triplets are chosen for good, and the others are zeroed after every further
    step; `finish` makes that choice if the training ended before.

    Attributes:
        schedule: The budget.
    """

    def __init__(
        self,
        triplets: Sequence[Triplets],
        schedule: BudgetSchedule,
        *,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.5,
        squared: bool = False,
    ) -> None:
        self.schedule = schedule
        self._triplets = list(triplets)
        self._beta1, self._beta2 = beta1, beta2
        self._orth_reg_weight, self._squared = orth_reg_weight, squared
        self._parameters = [p for t in self._triplets for p in (t.A, t.B, t.E)]
        self._sensitivity = [torch.zeros_like(p, dtype=_wide(p)) for p in self._parameters]
        self._uncertainty = [torch.zeros_like(p, dtype=_wide(p)) for p in self._parameters]
        self._final: list[Tensor] | None = None

    # ---- what a training loop calls
    def penalty(self) -> Tensor | float:
        """``orth_reg_weight`` times the mean over all ``A`` and ``B`` of how far they are from orthonormal."""
        matrices = sum(2 * t.matrices for t in self._triplets if t.number)
        if not self._orth_reg_weight or not matrices:
            return 0.0
        total: Tensor | float = 0.0
        for t in self._triplets:
            with own_precision(t.A):
                for gram in (t.A @ t.A.mT, t.B.mT @ t.B):
                    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
                    size = torch.linalg.vector_norm(gram, dim=(-2, -1))
                    total = total + (size.square() if self._squared else size).sum().to(self._parameters[0])
        return total * (self._orth_reg_weight / matrices)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Learn what the triplets are worth, and mask those beyond the budget of the step."""
        if self.schedule.end == self.schedule.start:
            return
        if step < self.schedule.final_step:
            self._observe()
            if self.schedule.masks(step):
                self._mask(self._best(self.schedule.budget(step)))
        else:
            self._finalise()

    @torch.no_grad()
    def finish(self) -> None:
        """Leave exactly the final budget."""
        if self.schedule.end < self.schedule.start:
            self._finalise()

    def ranks(self) -> dict[str, int]:
        """Path to the singular values that are not zero now, summed over a stack of matrices."""
        return {t.path: int(t.E.count_nonzero()) for t in self._triplets}

    # ---- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """The averages, and the final choice if it has been made."""
        return {
            "paths": [t.path for t in self._triplets],
            "sensitivity": [t.clone() for t in self._sensitivity],
            "uncertainty": [t.clone() for t in self._uncertainty],
            "final": None if self._final is None else [mask.clone() for mask in self._final],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``.

        Raises:
            TrainingError: The state belongs to other targets.
        """
        paths = [t.path for t in self._triplets]
        sizes = [p.shape for p in self._parameters]
        if state["paths"] != paths or (
            state["sensitivity"] and [t.shape for t in state["sensitivity"]] != sizes
        ):
            raise TrainingError(
                "The checkpoint's AdaLoRA averages belong to other targets or ranks than those of this adapter: "
                f"{len(state['paths'])} targets there, {len(paths)} here. Resume with the recipe that wrote it."
            )
        self._sensitivity = _beside(state["sensitivity"], self._parameters)
        self._uncertainty = _beside(state["uncertainty"], self._parameters)
        final = state["final"]
        self._final = (
            None if final is None else [m.to(t.E.device) for m, t in zip(final, self._triplets, strict=True)]
        )

    # ---- how it works
    def _observe(self) -> None:
        """Equations 8 to 10: ``I = |w g|``, its average, and the average of its distance from that average."""
        seen = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        weights = [self._parameters[i].to(self._sensitivity[i].dtype) for i in seen]
        gradients = [self._parameters[i].grad.to(w.dtype) for i, w in zip(seen, weights, strict=True)]  # type: ignore[union-attr]
        new: dict[int, Tensor] = dict(zip(seen, torch._foreach_mul(weights, gradients), strict=True))
        # A parameter that this step did not use is worth nothing in it. Nor may one overflow of half precision, whose
        # step the gradient scaler has skipped, outweigh everything that follows.
        now = [
            torch.nan_to_num_(new[i].abs_(), nan=0.0, posinf=0.0) if i in new else torch.zeros_like(average)
            for i, average in enumerate(self._sensitivity)
        ]
        torch._foreach_mul_(self._sensitivity, self._beta1)
        torch._foreach_add_(self._sensitivity, now, alpha=1 - self._beta1)
        torch._foreach_sub_(now, self._sensitivity)
        torch._foreach_abs_(now)
        torch._foreach_mul_(self._uncertainty, self._beta2)
        torch._foreach_add_(self._uncertainty, now, alpha=1 - self._beta2)

    def _scores(self) -> list[Tensor]:
        """What each triplet is worth, ``(*batch, r)`` a target (equation 11)."""
        worth = torch._foreach_mul(self._sensitivity, self._uncertainty)
        return [
            worth[3 * i].mean(-1) + worth[3 * i + 1].mean(-2) + worth[3 * i + 2].squeeze(-1)
            for i in range(len(self._triplets))
        ]

    def _best(self, budget: int) -> list[Tensor]:
        """Which triplets survive, ``(*batch, r)`` a target: exactly ``budget`` of them, whatever the scores.

        Equals are taken by turns: the first triplet of every matrix, then the second of every matrix.
        """
        scores = self._scores()
        home = scores[0].device
        flat = torch.cat([s.reshape(-1).to(home) for s in scores])
        turn = torch.cat([torch.arange(s.shape[-1], device=home).expand(s.shape).reshape(-1) for s in scores])
        by_turns = turn.argsort(stable=True)
        best = by_turns[flat[by_turns].argsort(descending=True, stable=True)[:budget]]
        survives = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, best, True)
        pieces = survives.split([s.numel() for s in scores])
        return [piece.view(s.shape).to(s.device) for piece, s in zip(pieces, scores, strict=True)]

    def _mask(self, survives: list[Tensor]) -> None:
        for t, mask in zip(self._triplets, survives, strict=True):
            t.E.masked_fill_(~mask.unsqueeze(-1), 0.0)

    def _finalise(self) -> None:
        """Choose once, then only hold the choice; the averages are not needed any more."""
        if self._final is None:
            self._final = self._best(self.schedule.end)
            self._sensitivity, self._uncertainty = [], []
        self._mask(self._final)


def _wide(p: Tensor) -> torch.dtype:
    """The dtype of averages over steps: at least float32."""
    return torch.promote_types(p.dtype, torch.float32)


def _beside(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Copies of averages on the devices of their parameters; of none, none."""
    return [t.to(p.device, _wide(p), copy=True) for t, p in zip(tensors, parameters, strict=False)]
