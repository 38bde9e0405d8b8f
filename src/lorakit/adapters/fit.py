"""Writing a change with as few directions as asked for, and saying what that cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lorakit.core import AdapterState
from lorakit.errors import ConfigError
from lorakit.ops.truncated_svd import Triplets


@dataclass(frozen=True)
class Residual:
    """What was wanted at one target, and what of it was left out.

    Attributes:
        r: The rank that was kept.
        norm: Frobenius norm of the change that was wanted.
        lost: Frobenius norm of what is missing from it: the root of the sum of the squares of the singular values that
            were left out, which no other change of that rank undercuts (Eckart and Young 1936).
    """

    r: int
    norm: float
    lost: float

    @property
    def error(self) -> float:
        """``lost / norm``; 0 where nothing was wanted."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Fitted:
    """An adapter, and how well it says what was asked for.

    Attributes:
        state: The adapter.
        residuals: Target path to what was left out there. A target that is exact by construction is not in it.
    """

    state: AdapterState
    residuals: Mapping[str, Residual]

    @property
    def error(self) -> float:
        """The relative error of the whole change, in the Frobenius norm over the targets that were approximated."""
        norm = math.hypot(*(found.norm for found in self.residuals.values()), 0.0)
        return math.hypot(*(found.lost for found in self.residuals.values()), 0.0) / norm if norm else 0.0

    @property
    def worst(self) -> tuple[str, float] | None:
        """The target with the largest relative error, and that error; None when everything is exact."""
        if not self.residuals:
            return None
        path = max(self.residuals, key=lambda p: self.residuals[p].error)
        return path, self.residuals[path].error


@dataclass(frozen=True)
class Cut:
    """How many directions to keep: a number, or as many as hold a share of the energy, or both (the smaller).

    Attributes:
        r: The most directions of a target.
        energy: The share of the sum of the squared singular values to keep, in (0, 1].

    Raises:
        ConfigError: A value makes no sense.
    """

    r: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.r is not None and (isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1):
            raise ConfigError(f"The rank must be a whole number of at least 1; got r={self.r!r}.")
        if self.energy is not None and not (isinstance(self.energy, (int, float)) and 0 < self.energy <= 1):
            raise ConfigError(f"energy is a share of the squared norm, in (0, 1]; got {self.energy!r}.")

    def __bool__(self) -> bool:
        return self.r is not None or self.energy is not None

    def rank(self, S: Tensor) -> int:
        """How many of the singular values ``(*batch, k)`` to keep; at least 1. A stack is judged as a whole."""
        most = S.shape[-1] if self.r is None else min(self.r, S.shape[-1])
        return min(most, S.shape[-1] if self.energy is None else energy_rank(S, self.energy))


def energy_rank(S: Tensor, energy: float) -> int:
    """The least k of which the first k singular values hold the share ``energy`` of the squared norm; at least 1.

    Args:
        S: ``(*batch, r)``, descending; of a stack the sums over all matrices count.
        energy: In (0, 1].
    """
    squares = S.double().square().reshape(-1, S.shape[-1]).sum(0)
    total = float(squares.sum())
    if not total:
        return 1
    tails = squares.flip(0).cumsum(0).flip(0)  # what is lost when only the first k are kept, for k = 0 ...
    return max(1, int((tails > (1 - energy) * total * (1 + 1e-12) + total * 1e-30).sum()))


def split(triplets: Triplets, r: int) -> tuple[Tensor, Tensor, Residual]:
    """``A``, ``B`` of the first ``r`` triplets, and what the others hold.

    Each factor gets the root of the singular values: neither runs out of range in half precision, and training that
    goes on finds them balanced.
    """
    root = triplets.S[..., :r].sqrt()
    A = root.unsqueeze(-1) * triplets.Vh[..., :r, :]
    B = triplets.U[..., :r] * root.unsqueeze(-2)
    squares = triplets.S.double().square()
    return A, B, Residual(r, math.sqrt(float(squares.sum())), math.sqrt(float(squares[..., r:].sum())))
