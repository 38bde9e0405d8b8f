"""Linear layers: ``nn.Linear`` and transformers' ``Conv1D``, which is a linear layer stored as ``(in, out)``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.target import Binding, Shape, Storage, Target
from lorakit.ops import add_low_rank


class LinearTarget(Target):
    """``nn.Linear`` and its subclasses: weight ``(out, in)``."""

    def __init__(
        self,
        path: str,
        module: nn.Module,
        storage: Storage,
        parameter: str = "weight",
        binding: Binding = "forward",
    ) -> None:
        super().__init__(path, module, parameter, storage, binding)
        self.shape = Shape("linear", out=int(module.out_features), in_=int(module.in_features))  # type: ignore[arg-type]

    def to_matrix(self, stored: Tensor) -> Tensor:
        """As stored."""
        return stored

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """As stored."""
        return matrix

    def apply(self, x: Tensor, W: Tensor) -> Tensor:
        """``x Wᵀ``."""
        return F.linear(x, W)

    def add_low_rank(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """The fused product, in the memory of ``y``."""
        return add_low_rank(y, x, A, B, scale, dropout)

    def arrange(self, role: str, tensor: Tensor) -> Tensor:
        """Keep ``B`` as ``(r, out)`` in memory: its product with one token then runs along rows (twice as fast)."""
        return tensor.mT.contiguous().mT if role == "B" and tensor.dim() == 2 else tensor


class TransposedLinearTarget(LinearTarget):
    """transformers' ``Conv1D`` (GPT-2): weight ``(in, out)``, recognised by its class name."""

    def __init__(
        self,
        path: str,
        module: nn.Module,
        storage: Storage,
        parameter: str = "weight",
        binding: Binding = "forward",
    ) -> None:
        Target.__init__(self, path, module, parameter, storage, binding)
        in_, out = self.stored.shape
        self.shape = Shape("linear", out=out, in_=in_)

    def to_matrix(self, stored: Tensor) -> Tensor:
        """Transposed, as a view."""
        return stored.mT

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Transposed, as a view."""
        return matrix.mT
