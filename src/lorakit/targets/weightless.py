"""Targets that are no weight: what is adapted is what a module computes, so there is nothing to merge into."""

from __future__ import annotations

from torch import Tensor

from lorakit.core.target import Target
from lorakit.errors import UnsupportedTargetError


class WeightlessTarget(Target):
    """A module as a whole. Its facts are widths; whatever would need a weight is refused."""

    @property
    def stored(self) -> Tensor:
        """A parameter of the module's own: for its device and dtype."""
        return next(self.module.parameters())

    @property
    def bias(self) -> Tensor | None:
        """None: there is no weight that a bias would go with."""
        return None

    def to_matrix(self, stored: Tensor) -> Tensor:
        """Refused."""
        raise self._no_weight()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Refused."""
        raise self._no_weight()

    def weight(self) -> Tensor:
        """Refused."""
        raise self._no_weight()

    def apply(self, x: Tensor, W: Tensor) -> Tensor:
        """Refused."""
        raise self._no_weight()

    def add_low_rank(
        self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """Refused."""
        raise self._no_weight()

    def _no_weight(self) -> UnsupportedTargetError:
        return UnsupportedTargetError(
            f"{self.path or 'the model'!r} is a {type(self.module).__name__} that is adapted as a whole: it is not one "
            "weight, so no method that changes a weight works on it."
        )
