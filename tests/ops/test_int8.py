"""Row-wise int8: rounding, scales, and bitsandbytes bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorakit.errors import ConfigError
from lorakit.ops.int8 import quantize_int8

SIZES = ((64, 96), (7, 9), (1, 5), (3000, 130))


def normal(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", SIZES)
def test_the_error_is_at_most_half_a_step(size: tuple[int, int]) -> None:
    W = normal(*size)
    packed = quantize_int8(W)
    assert packed.codes.dtype is torch.int8
    assert torch.equal(packed.absmax, W.abs().amax(-1))
    step = packed.absmax.unsqueeze(-1) / 127
    assert ((packed.dequantize() - W).abs() <= 0.5001 * step).all()
    assert (packed.codes.abs().amax(-1) == 127).all()
    assert torch.equal(packed.values(), packed.dequantize())


def test_bits_and_sizes() -> None:
    packed = quantize_int8(normal(512, 1024))
    assert 8 * packed.nbytes / packed.numel == 8 + 32 / 1024
    meta = quantize_int8(torch.empty(512, 1024, device="meta"))
    assert meta.nbytes == packed.nbytes
    assert meta.dequantize().shape == (512, 1024)


def test_quantising_again_changes_nothing() -> None:
    once = quantize_int8(normal(64, 96))
    assert torch.equal(quantize_int8(once.dequantize()).codes, once.codes)


def test_rows_of_zeros_stay_zero() -> None:
    W = normal(4, 8)
    W[2] = 0
    values = quantize_int8(W).dequantize()
    assert not values[2].any()
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_are_rounded_once_to_another_dtype(dtype: torch.dtype) -> None:
    packed = quantize_int8(normal(300, 200))
    assert torch.equal(packed.dequantize(dtype), packed.dequantize().to(dtype))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    W = normal(4, 8)
    W[3, 7] = bad
    with pytest.raises(ConfigError, match="NaN"):
        quantize_int8(W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_bitsandbytes_bit_for_bit(size: tuple[int, int], dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    W = normal(*size).to(dtype)
    codes, absmax, _ = functional.int8_vectorwise_quant(W)
    ours = quantize_int8(W)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, absmax)
    assert torch.equal(ours.dequantize(), functional.int8_vectorwise_dequant(codes, absmax))
