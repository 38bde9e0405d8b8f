"""How much the directions of two adapters have in common: the subspace similarity of the LoRA paper, section 7.2.

``phi(i, j) = ||U1_iᵀ U2_j||_F² / min(i, j)`` for the first ``i`` directions of one and the first ``j`` of the other:
the mean squared cosine of the angles between the two subspaces, 0 when they are orthogonal and 1 when the smaller lies
in the larger. Two random subspaces of n dimensions have ``max(i, j) / n`` on average: only what is above that tells
anything. (The paper's appendix relates phi to the projection metric d of Hamm and Lee 2008 as ``(1 - d²) / p``; with
``d² = p - sum cos²`` and ``p = min(i, j)`` it is ``1 - d² / p``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lorakit.adapters.change import low_rank_change, without_magnitude
from lorakit.core import AdapterState
from lorakit.errors import ConfigError
from lorakit.ops.low_rank_svd import low_rank_svd
from lorakit.ops.truncated_svd import Triplets

Of = Literal["A", "B", "inputs", "outputs"]


@dataclass(frozen=True)
class Similarity:
    """The subspace similarity of two sets of ordered directions, for all numbers of directions.

    Attributes:
        phi: ``(k1, k2)``: the entry ``[i - 1, j - 1]`` is that of the first ``i`` and the first ``j`` directions. Of a
            stack, the mean over its matrices.
        size: The dimension ``n`` of the space.
    """

    phi: Tensor
    size: int

    def at(self, i: int, j: int) -> float:
        """``phi(i, j)``.

        Raises:
            ConfigError: One of them has fewer directions.
        """
        if not (1 <= i <= self.phi.shape[0] and 1 <= j <= self.phi.shape[1]):
            raise ConfigError(
                f"phi({i}, {j}) is not defined: the first has {self.phi.shape[0]} directions, the second "
                f"{self.phi.shape[1]}."
            )
        return float(self.phi[i - 1, j - 1])

    @property
    def whole(self) -> float:
        """That of all directions."""
        return float(self.phi[-1, -1])

    def chance(self, i: int, j: int) -> float:
        """The mean of ``phi(i, j)`` over random subspaces: ``max(i, j) / n``."""
        return max(i, j) / self.size

    @property
    def random(self) -> Tensor:
        """``(k1, k2)``: what random subspaces have on average, see ``chance``."""
        i, j = (torch.arange(1, k + 1, dtype=torch.float64) for k in self.phi.shape)
        return torch.maximum(i[:, None], j[None]) / self.size


def directions(factor: Tensor) -> Tensor:
    """The right singular vectors of a matrix as rows, by falling singular value; zero where there is none.

    Args:
        factor: ``(*batch, r, n)``.

    Returns:
        ``(*batch, k, n)``, float64: ``k`` is the rank, of a stack the largest.
    """
    _, S, Vh = torch.linalg.svd(factor.detach().double(), full_matrices=False)
    return real_rows(S, Vh, max(factor.shape[-2:]))


def subspace_similarity(first: Tensor, second: Tensor) -> Similarity:
    """The similarity of the row spaces of two matrices, for all numbers of their leading right singular vectors.

    Args:
        first: ``(*batch, r1, n)``, such as a ``lora_A``, or the transpose of a ``lora_B``.
        second: ``(*batch, r2, n)``.

    Raises:
        ConfigError: The sizes do not match, a matrix is zero, or holds a NaN or an infinity.
    """
    if first.shape[-1] != second.shape[-1] or first.shape[:-2] != second.shape[:-2]:
        raise ConfigError(
            "Directions are compared in one space: the matrices need equal last sizes and equal stacks; got "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    for which, matrix in (("first", first), ("second", second)):
        if not torch.isfinite(matrix).all():
            raise ConfigError(f"The {which} matrix holds a NaN or an infinity: it has no directions.")
    return similarity_of(directions(first), directions(second))


def similarity(a: AdapterState, b: AdapterState, path: str, of: Of = "A") -> Similarity:
    """The subspace similarity of two adapters at a target that both have.

    Args:
        a: The first.
        b: The second.
        path: The target. With DoRA the change of the direction counts, before the magnitude.
        of: What is compared. ``"A"``: the right singular vectors of the factor A, as in the paper's figures; ``"B"``:
            the left ones of B. ``"inputs"``: the right singular vectors of the change ``B A``, by what they add;
            ``"outputs"``: its left ones.

    Raises:
        ConfigError: One of them has no factors there, or no change, or the sizes differ.
    """
    if of not in get_args(Of):
        raise ConfigError(f"of is one of {', '.join(map(repr, get_args(Of)))}; got {of!r}.")
    found = []
    for who, state in (("first", a), ("second", b)):
        if path not in state.spec.methods:
            raise ConfigError(f"The {who} adapter has no target {path!r}.")
        rows = _rows(state, path, of)
        if not rows.shape[-2]:
            raise ConfigError(
                f"The {who} adapter changes nothing at {path!r} (what is asked for of {of!r} is zero there): it has no "
                "directions."
            )
        found.append(rows)
    if found[0].shape[-1] != found[1].shape[-1] or found[0].shape[:-2] != found[1].shape[:-2]:
        raise ConfigError(
            f"{path!r} is of {a.spec.shapes[path]} in the first adapter and of {b.spec.shapes[path]} in the second: "
            "they belong to different models."
        )
    return similarity_of(*found)


def change_triplets(state: AdapterState, path: str) -> Triplets:
    """The singular triplets of a low-rank change with its scale in them, float64; inside a DoRA, of the direction's.

    Raises:
        ConfigError: The method there has no factors, or a tensor is not finite.
    """
    return low_rank_svd(*_factors(state, path))


def real_directions(S: Tensor, size: int) -> int:
    """How many singular values are more than the rounding of a matrix of that size; of a stack, the most.

    Args:
        S: ``(*batch, k)``, descending.
        size: The larger size of the matrix.
    """
    return int(is_real(S, size).sum(-1).max()) if S.numel() else 0


def _rows(state: AdapterState, path: str, of: Of) -> Tensor:
    """The directions that are asked for, as rows."""
    if of in ("inputs", "outputs"):
        U, S, Vh = change_triplets(state, path)
        return real_rows(S, Vh if of == "inputs" else U.mT, max(U.shape[-2], Vh.shape[-1]))
    A, B = _factors(state, path)
    return directions(A if of == "A" else B.mT)


def _factors(state: AdapterState, path: str) -> tuple[Tensor, Tensor]:
    A, B = low_rank_change(without_magnitude(state, path), path).folded()
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise ConfigError(f"{path!r} holds a NaN or an infinity: its training went wrong there.")
    return A, B


def real_rows(S: Tensor, rows: Tensor, size: int) -> Tensor:
    """Rows whose singular value is not zero but for rounding; in a stack, zeros where another has more of them."""
    real = is_real(S, size)
    return (rows * real.unsqueeze(-1))[..., : real_directions(S, size), :]


def is_real(S: Tensor, size: int) -> Tensor:
    """Which singular values are more than the rounding of a matrix of that size.

    Args:
        S: ``(*batch, k)``, descending.
        size: The larger size of the matrix.

    Returns:
        ``(*batch, k)``, bool.
    """
    return S[..., :1] * size * torch.finfo(S.dtype).eps < S


def similarity_of(first: Tensor, second: Tensor) -> Similarity:
    """That of directions, which are orthonormal rows or zero.

    Raises:
        ConfigError: There are none.
    """
    if not (first.shape[-2] and second.shape[-2]):
        raise ConfigError("A matrix of zeros has no directions to compare.")
    overlap = (first @ second.mT).square().cumsum(-2).cumsum(-1)
    i, j = (torch.arange(1, k + 1, dtype=overlap.dtype) for k in overlap.shape[-2:])
    phi = (overlap / torch.minimum(i[:, None], j[None])).reshape(-1, *overlap.shape[-2:]).mean(0)
    return Similarity(phi.clamp(max=1.0), first.shape[-1])
