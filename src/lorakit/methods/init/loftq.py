"""LoftQ: quantise a weight and start the adapter where the two together are nearest to the weight.

``min ||W - Q - B A||`` over quantised ``Q`` and ``B A`` of rank r, by turns: ``Q_t = q(W - B_{t-1} A_{t-1})``, then
``B_t A_t`` is the best rank-r approximation of ``W - Q_t`` (algorithm 1). A turn of quantisation can make the distance
larger, so the best pair of all turns is kept. QPiSSA (arXiv 2404.02948, section 4) takes the same turns in the other
order: the principal triplets first, then the rest is quantised.
Source: Li et al. 2023 (arXiv 2310.08659), equation 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lorakit.errors import ConfigError
from lorakit.ops import Packed, own_precision
from lorakit.ops.truncated_svd import Triplets, leading_triplets

First = Literal["quantize", "svd"]


class LoftQ(NamedTuple):
    """A quantised weight and the factors that make up for its error.

    Attributes:
        packed: The quantised weight, ``(out, in)``.
        A: ``(r, in)``.
        B: ``(out, r)``: ``W`` is nearly the quantised weight plus ``B A``.
        errors: ``||W - Q - B A|| / ||W||`` after each turn; what is kept has the least.
    """

    packed: Packed
    A: Tensor
    B: Tensor
    errors: tuple[float, ...]


def loftq(
    W: Tensor,
    r: int,
    encode: Callable[[Tensor], Packed],
    *,
    iterations: int = 5,
    first: First = "quantize",
    decompose: Callable[[Tensor, int], Triplets] = leading_triplets,
) -> LoftQ:
    """The best pair that so many turns find.

    Args:
        W: ``(out, in)``, floating-point; computed in at least float32.
        r: The rank, at most the smaller side.
        encode: Quantises a matrix.
        iterations: Turns. One turn that quantises first is the decomposition of the quantisation error.
        first: ``"quantize"`` (LoftQ) or ``"svd"`` (QPiSSA).
        decompose: Gives the leading singular triplets.

    Raises:
        ConfigError: There is no turn to take, or the order is not known.
    """
    if iterations < 1 or isinstance(iterations, bool):
        raise ConfigError(f"LoftQ takes at least one iteration; got {iterations!r}.")
    if first not in ("quantize", "svd"):
        raise ConfigError(f"first is 'quantize' (LoftQ) or 'svd' (QPiSSA); got {first!r}.")
    W = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    norm = float(W.norm()) or 1.0
    best: LoftQ | None = None
    errors: list[float] = []
    with torch.no_grad(), own_precision(W):
        rest = W
        for _ in range(iterations):
            if first == "svd":
                A, B = _halves(decompose(rest, r))
                packed = encode(W - B @ A)
                rest = W - packed.dequantize(W.dtype)
            else:
                packed = encode(rest)
                error = W - packed.dequantize(W.dtype)
                A, B = _halves(decompose(error, r))
                rest = W - B @ A
            left = W - packed.dequantize(W.dtype) - B @ A
            errors.append(float(left.norm()) / norm)
            if best is None or errors[-1] < min(errors[:-1]):
                best = LoftQ(packed, A, B, ())
    assert best is not None
    return best._replace(errors=tuple(errors))


def _halves(triplets: Triplets) -> tuple[Tensor, Tensor]:
    root = triplets.S.sqrt()
    return root.unsqueeze(-1) * triplets.Vh, triplets.U * root.unsqueeze(-2)
