"""Both factors random and their product zero: the rows of ``A`` and the columns of ``B`` meet no common direction.

Source: PEFT's ``init_lora_weights="orthogonal"``, after datta0.github.io/posts/rethink-lora-init. No paper is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.target import Target
from lorakit.errors import ConfigError


def orthogonal(target: Target, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """``A = Q_1ᵀ X / 10`` and ``B = Y Q_2 / 10`` with Gaussian ``X``, ``Y`` and disjoint rows ``Q_1``, ``Q_2``.

    ``Q_1`` and ``Q_2`` are the rows of even and of odd number of a random orthogonal ``r x r`` matrix, so that
    ``Q_2 Q_1ᵀ = 0`` and with it ``B A``, up to the rounding of the factors. Both factors have a gradient from the first
    step on.

    Raises:
        ConfigError: ``r`` is odd, so the rows of the orthogonal matrix cannot be shared out.
    """
    if r % 2:
        raise ConfigError(
            f"init='orthogonal' gives half of the rank to each factor, so the rank must be even; {target.path!r} has "
            f"r={r}."
        )

    def gaussian(*size: int) -> Tensor:
        # In float64, so that only the rounding of the factors to their own dtype keeps their product from being zero.
        return torch.randn(*target.batch, *size, generator=generator, dtype=torch.float64)

    Q = torch.linalg.qr(gaussian(r, r)).Q
    X, Y = gaussian(r // 2, target.in_), gaussian(target.out, r // 2)
    return Q[..., 0::2, :].mT @ X / 10, Y @ Q[..., 1::2, :] / 10
