"""Linear layers: ``nn.Linear`` and transformers' ``Conv1D``, which is a linear layer stored as ``(in, out)``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.target import Binding, Shape, Storage, Target
from lorakit.ops import add_low_rank, kronecker_linear


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

    def weight_gradient(self, x: Tensor, gradient: Tensor) -> Tensor:
        """``Gᵀ x`` over all vectors."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return gradient.reshape(-1, gradient.shape[-1]).to(wide).mT @ x.reshape(-1, self.in_).to(wide)

    def apply_kronecker(self, x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
        """Two small products."""
        return kronecker_linear(x, W1, W2)

    # The fused product itself, in the memory of ``y``: one call less for every layer and token.
    add_low_rank = staticmethod(add_low_rank)

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
