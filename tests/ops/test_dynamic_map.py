"""The signed dynamic map and blocks on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.ops.dynamic_map import BLOCK, dequantize_dynamic, dynamic_map, quantize_dynamic


def inputs() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    edges = ((2 * torch.arange(65536, dtype=torch.float64) + 1) / 65535 - 1).float().view(-1, BLOCK)
    edges[:, 0] = 1
    return {
        "normal": torch.randn(100_001, generator=draw),
        "small": 1e-3 * torch.rand(700, generator=draw) - 5e-4,
        "short": torch.randn(5, generator=draw),
        "with zeros": torch.cat([torch.zeros(BLOCK), torch.randn(300, generator=draw)]),
        "edges of cells": edges.reshape(-1),
        "past the edges": torch.nextafter(edges, torch.tensor(9.0)).clamp(max=1).reshape(-1),
    }


def test_the_map_has_a_number_for_every_byte() -> None:
    values = dynamic_map()
    assert values.shape == (256,)
    assert torch.equal(values, values.sort().values)
    assert values.unique().numel() == 256
    assert int((values < 0).sum()) == 127
    assert values[-1] == 1
    assert (values == 0).any()
    positive = values[(values > 0) & (values < 1)]
    assert torch.equal(-positive.flip(0), values[values < 0])
    for power in range(7):  # one more binary digit for each power of ten
        low, high = 10.0 ** (power - 7), 10.0 ** (power - 6)
        assert int(((positive > low) & (positive < high)).sum()) == 2**power


@pytest.mark.parametrize("name", inputs())
def test_values_come_back_nearly(name: str) -> None:
    x = inputs()[name]
    codes, scales = quantize_dynamic(x)
    assert codes.dtype is torch.uint8
    assert codes.shape == x.shape
    of_block = scales.repeat_interleave(BLOCK)[: x.numel()]
    error = (dequantize_dynamic(codes, scales) - x).abs() / of_block.clamp(min=1e-30)
    assert error.max() < 0.0075  # half the widest gap of the map
    assert torch.equal(scales, torch.stack([part.abs().max() for part in x.split(BLOCK)]))


def test_a_block_of_zeros_comes_back_as_zeros() -> None:
    codes, scales = quantize_dynamic(torch.zeros(300))
    assert not dequantize_dynamic(codes, scales).any()


@pytest.mark.parametrize("name", inputs())
def test_bitsandbytes_bit_for_bit(name: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = inputs()[name]
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())
    codes, scales = quantize_dynamic(x)
    theirs, state = functional.quantize_blockwise(x, blocksize=BLOCK)
    assert torch.equal(codes, theirs)
    assert torch.equal(scales, state.absmax)
    assert torch.equal(dequantize_dynamic(codes, scales), functional.dequantize_blockwise(theirs, state))
