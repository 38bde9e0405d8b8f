"""Blocks of 256 numbers in eight bits on the signed dynamic map: how the scales of NF4 are themselves kept.

The map has 256 sorted values. For every power of ten from 1e-6 to 1 and both signs: the middles of 1, 2, 4, ... 64
equal parts of ``[0.1, 1]`` times it, so that small numbers keep their order of magnitude and large ones their digits;
and 0 and 1. Source: Dettmers et al. 2022 (arXiv 2110.02861), section 2.2.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lorakit.ops.low_rank import transformed

BLOCK = 256
_CELLS = 65536


def dynamic_map() -> Tensor:
    """The 256 values, ascending, float32: -0.993 to 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``(n,)`` uint8 and scales ``(blocks,)`` float32 of a flat float32 tensor, block by block.

    Each number is divided by the largest magnitude of its block, placed in one of 65,536 equal cells of ``[-1, 1]``,
    and gets the value of the map that is nearest to its cell: the rule of bitsandbytes' CPU kernel, bit for bit.
    """
    n = x.numel()
    blocks = -(-n // BLOCK)
    padded = x.new_zeros(blocks * BLOCK)
    padded[:n] = x
    rows = padded.view(blocks, BLOCK)
    scales = rows.abs().amax(-1)
    _, nearest = _tables(x.device)
    cells = rows.mul(1 / scales.unsqueeze(-1)).add_(1).mul_((_CELLS - 1) / 2).add_(0.5)
    # A block of zeros has no direction; whatever its code is, its scale makes it zero.
    cells = cells.nan_to_num_(0, 0, 0).long().clamp_(0, _CELLS - 1)
    return nearest[cells].view(-1)[:n].clone(), scales


def dequantize_dynamic(codes: Tensor, scales: Tensor) -> Tensor:
    """The values ``(n,)``, float32."""
    if transformed():
        values = torch.tensor(_VALUES, dtype=torch.float32, device=codes.device)
    else:
        values, _ = _tables(codes.device)
    n = codes.numel()
    return values.index_select(0, codes.int()).mul(scales.repeat_interleave(BLOCK)[:n])


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The map, and the code of each cell."""
    with torch.inference_mode(False):
        values = torch.tensor(_VALUES, dtype=torch.float32, device="cpu")
        middles = 2 * torch.arange(_CELLS, dtype=torch.float64, device="cpu") / (_CELLS - 1) - 1
        nearest = torch.bucketize(middles.float(), (values[:-1] + values[1:]) / 2, right=True)
        return values.to(device), nearest.to(device=device, dtype=torch.uint8)


_VALUES = tuple(dynamic_map().tolist())
