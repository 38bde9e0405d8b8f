"""LoRA-FA: a LoRA whose ``A`` stays where it starts, so that the backward pass needs ``x Aᵀ`` and not ``x``.

Source: Zhang et al. 2023 (arXiv 2308.03303), section 3; the corrected gradient is that of PEFT's optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.method import Tensors
from lorakit.core.process import Site, TrainingProcess
from lorakit.core.registry import register
from lorakit.core.target import Shape, Target
from lorakit.errors import ConfigError
from lorakit.methods.lora import LoRA
from lorakit.ops import own_precision


@register("lora_fa")
@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA with a frozen ``A``: everything else is LoRA's.

    Only ``lora_B`` is trained, ``r out`` numbers a matrix, and the change stays in the row space of ``A``.

    Attributes:
        gradient_correction: Replace the gradient of ``B`` by ``g (A Aᵀ)⁻¹ / s²`` before each optimizer step, so that a
            step of plain descent changes the weight by the full gradient projected on the rows of ``A``, whatever ``A``
            and the scale are (PEFT). Needs the process of `lorakit.training_processes` (``lorakit train`` runs it). The
            paper's first version has none.
    """

    gradient_correction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_correction and not all((self.alpha, *self.alpha_pattern.values())):
            raise ConfigError("With alpha=0 there is no gradient to correct: choose another alpha.")

    @property
    def frozen(self) -> frozenset[str]:
        """``lora_A``, and a subtracted start."""
        return super().frozen | {"lora_A"}

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """LoRA's; but ``A`` is random and ``B`` zero in an embedding too, or nothing could ever be learnt there.

        The usual start of an embedding is the other way round. As its input is one-hot, ``A ~ U(-1, 1)`` gives
        ``x Aᵀ`` the variance that Kaiming's start gives it for inputs of variance one.
        """
        tensors = super().start(target, generator, shared)
        if target.shape.lookup and not tensors["lora_A"].any():
            A = torch.empty(tensors["lora_A"].shape).uniform_(-1, 1, generator=generator)
            if target.padding is not None:
                A[..., target.padding] = 0
            tensors |= {"lora_A": A, "lora_B": torch.zeros_like(tensors["lora_B"])}
        return tensors

    def plain(self, shape: Shape, tensors: Tensors) -> tuple[LoRA, Tensors]:
        """A LoRA: which factor was trained is nothing that a finished adapter has to know."""
        method, tensors = super().plain(shape, tensors)
        settings = {field.name: getattr(method, field.name) for field in dataclasses.fields(LoRA)}
        return LoRA(**settings), tensors

    def process(self, sites: Sequence[Site], total_steps: int) -> TrainingProcess | None:
        """What corrects the gradients, if they are to be corrected."""
        corrected = []
        for site in sites:
            method = site.method
            assert isinstance(method, LoRAFA)
            if method.gradient_correction:
                corrected.append((site.parameters["lora_A"], site.parameters["lora_B"], method.scale))
        return GradientCorrection(corrected) if corrected else None


class GradientCorrection(TrainingProcess):
    """Turns the gradient of each ``B`` into ``g (A Aᵀ + 1e-8 I)⁻¹ / s²``, in at least float32."""

    def __init__(self, factors: Sequence[tuple[nn.Parameter, nn.Parameter, float]]) -> None:
        self._factors = list(factors)
        self._inverses: list[Tensor] = []

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Correct the gradients in place."""
        if not self._inverses:  # A is frozen: once is enough
            self._inverses = [_inverse(A, scale) for A, _, scale in self._factors]
        for (_, B, _), inverse in zip(self._factors, self._inverses, strict=True):
            if B.grad is not None:
                with own_precision(B):
                    B.grad.copy_(B.grad.to(inverse.dtype) @ inverse)


def _inverse(A: Tensor, scale: float) -> Tensor:
    """``(A Aᵀ + 1e-8 I)⁻¹ / s²``, ``(*batch, r, r)``; in directions that ``A`` has not, zero."""
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    with own_precision(A):
        gram = A @ A.mT
        gram.diagonal(dim1=-2, dim2=-1).add_(1e-8)
        return torch.linalg.pinv(gram, hermitian=True) / scale**2
