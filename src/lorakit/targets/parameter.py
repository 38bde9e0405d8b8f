"""Bare parameters: weights that a module reads itself, so no call of a layer can be hooked.

``nn.MultiheadAttention``'s projections, mixture-of-experts weights kept as one tensor, biases, norms.
"""

from __future__ import annotations

from torch import Tensor, nn

from lorakit.core.target import Shape, Storage, Target
from lorakit.errors import RoutingError


class ParameterTarget(Target):
    """An ``nn.Parameter`` of any size.

    A vector of n is seen as ``n x 1``, a matrix as it is, and ``(..., out, in)`` as a stack.
    """

    def __init__(self, path: str, module: nn.Module, parameter: str, storage: Storage) -> None:
        super().__init__(path, module, parameter, storage, "parameter")
        size = tuple(self.stored.shape)
        if len(size) >= 2:
            self.shape = Shape("parameter", out=size[-2], in_=size[-1], batch=size[:-2], stored=size)
        else:
            self.shape = Shape("parameter", out=size[0] if size else 1, in_=1, stored=size)

    @property
    def bias(self) -> Tensor | None:
        """None: whatever bias the module has is not this parameter's."""
        return None

    def to_matrix(self, stored: Tensor) -> Tensor:
        """A view with at least two dimensions."""
        return stored if stored.dim() >= 2 else stored.reshape(self.out, 1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The size it is stored with."""
        return matrix.reshape(self.shape.stored)

    def apply(self, x: Tensor, W: Tensor) -> Tensor:
        """Unknown: the module decides what the parameter does."""
        raise RoutingError(f"{self.path!r} is a bare parameter: its module decides what is computed with it.")

    def add_low_rank(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """Unknown: the module decides what the parameter does."""
        raise RoutingError(f"{self.path!r} is a bare parameter: its module decides what is computed with it.")
