"""Embedding tables: weight ``(vocabulary, width)``, seen as ``(out=width, in=vocabulary)``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.target import Binding, Shape, Storage, Target
from lorakit.ops import add_lookup


class EmbeddingTarget(Target):
    """A lookup is a product with a one-hot input, so ``A``'s columns are looked up and never multiplied.

    Attributes:
        gain: What the layer multiplies its rows by (Gemma's scaled embeddings); 1 for a plain ``nn.Embedding``.
    """

    def __init__(
        self, path: str, module: nn.Module, storage: Storage, binding: Binding = "forward", gain: float = 1.0
    ) -> None:
        super().__init__(path, module, "weight", storage, binding)
        self.shape = Shape("embedding", out=int(module.embedding_dim), in_=int(module.num_embeddings))  # type: ignore[arg-type]
        self.gain = gain

    @property
    def padding(self) -> int | None:
        """The layer's ``padding_idx``."""
        padding = self.module.padding_idx
        return None if padding is None else int(padding)  # type: ignore[arg-type]

    def to_matrix(self, stored: Tensor) -> Tensor:
        """Transposed, as a view."""
        return stored.mT

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Transposed, as a view."""
        return matrix.mT

    def apply(self, x: Tensor, W: Tensor) -> Tensor:
        """The looked-up columns of ``W``."""
        rows = F.embedding(x, W.mT, padding_idx=self.padding)
        return rows if self.gain == 1 else rows * self.gain

    def add_low_rank(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """Look up columns of ``A``, multiply by ``B`` into ``y``. An index has nothing to drop."""
        return add_lookup(y, x, A, B, scale * self.gain, self.padding)

    def arrange(self, role: str, tensor: Tensor) -> Tensor:
        """Keep ``A`` as ``(vocabulary, r)`` in memory: a lookup then reads neighbouring numbers (4x faster)."""
        return tensor.mT.contiguous().mT if role == "A" and tensor.dim() == 2 else tensor
