"""OLoRA: training starts from the first columns of a QR decomposition of the weight.

Source: Büyükakyüz 2024 (arXiv 2406.01775), algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.target import Target
from lorakit.ops import own_precision


def olora(target: Target, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """``B = Q_r`` with orthonormal columns, ``A = R_r``: ``B A = Q_r Q_rᵀ W``.

    That is the projection of ``W`` on the span of its first r columns, so it depends on the order of the inputs. The
    signs of the factors are those of the library that decomposes; their product has no such freedom.
    """
    W = target.weight()
    with own_precision(W):
        Q, R = torch.linalg.qr(W.to(torch.promote_types(W.dtype, torch.float32)))
    return R[..., :r, :].contiguous(), Q[..., :r].contiguous()
