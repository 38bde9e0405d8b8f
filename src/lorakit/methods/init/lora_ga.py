"""LoRA-GA: the first step of training follows the gradient that full fine-tuning would follow.

Source: Wang et al. 2024 (arXiv 2407.05000), in the form of the authors' code (``lora_ga_init`` with
``scale="stable"``). PEFT's option of the same name scales otherwise: it leaves ``A`` at norm one and multiplies ``B``
by singular values of the gradient.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lorakit.errors import ConfigError
from lorakit.ops.truncated_svd import leading_triplets_by_projection

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]


def lora_ga(
    gradient: Tensor,
    r: int,
    *,
    gamma: float = 16.0,
    direction: Direction = "ArB2r",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Factors from the first 2 r singular vectors of the gradient of the weight, ``G ~ U S Vᵀ``.

    Both are multiplied by ``out ** 0.25 / sqrt(gamma)``, so ``A Aᵀ = Bᵀ B = (sqrt(out) / gamma) I``: the change then
    neither grows nor vanishes with the width.

    Args:
        gradient: ``(*batch, out, in)``; its length does not matter.
        r: The rank; at most half the smaller of ``out`` and ``in``.
        gamma: Larger values give smaller factors.
        direction: Which singular vectors: ``"ArB2r"`` the first r for ``A`` and the next r for ``B``, with which the
            first step of ``s B A`` is the best approximation of the gradient of rank 2 r; ``"A2rBr"`` the other way
            round; ``"ArBr"`` in turn; ``"random"`` r of the 2 r drawn for ``A``, the others for ``B``.
        generator: Of the random projection, and of ``"random"``.

    Returns:
        ``A`` ``(*batch, r, in)`` and ``B`` ``(*batch, out, r)``.

    Raises:
        ConfigError: The matrix has fewer than 2 r singular vectors, or no direction is called so.
    """
    if direction not in get_args(Direction):
        raise ConfigError(f"direction is one of {', '.join(get_args(Direction))}; got {direction!r}.")
    if not gamma > 0:
        raise ConfigError(f"gamma divides the factors: it must be greater than 0; got {gamma!r}.")
    out, in_ = gradient.shape[-2:]
    if 2 * r > min(out, in_):
        raise ConfigError(
            f"LoRA-GA takes 2 r singular vectors of the gradient, and a {out} x {in_} matrix has {min(out, in_)}: "
            f"choose r <= {min(out, in_) // 2} there."
        )
    # As many iterations as the authors' code, on a block of 4 r columns.
    most = min(4 * r, out, in_)
    U, _, Vh = leading_triplets_by_projection(gradient, most, iterations=4, generator=generator)
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    if direction == "ArBr":
        first, second = torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)
    elif direction == "A2rBr":
        first, second = second, first
    elif direction == "random":
        first, second = torch.randperm(2 * r, generator=generator).chunk(2)
    scale = out**0.25 / gamma**0.5
    A = Vh.index_select(-2, first.to(Vh.device)) * scale
    B = U.index_select(-1, second.to(U.device)) * scale
    return A, B
