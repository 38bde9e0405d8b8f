"""NF4: levels, packing, bits, errors, and bitsandbytes bit for bit."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from lorakit.errors import ConfigError
from lorakit.ops.nf4 import BLOCK_SIZES, NF4, NF4_LEVELS, quantize_nf4

SHAPES = ((64, 64), (7, 9), (3, 5), (100, 130), (33, 48), (96, 1024), (5,), (1, 1), (31, 777))


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(W: Tensor, packed: NF4) -> float:
    return float((W - packed.dequantize(W.dtype)).norm() / W.norm())


def by_hand(W: Tensor, block: int) -> Tensor:
    """One number after another, in Python: the nearest level times the largest magnitude of its block."""
    flat = W.flatten().tolist()
    values = []
    for start in range(0, len(flat), block):
        part = flat[start : start + block]
        most = max(abs(v) for v in part)
        for v in part:
            level = min(NF4_LEVELS, key=lambda level: abs(level - (v / most if most else 0.0)))
            values.append(level * most)
    return torch.tensor(values, dtype=torch.float64).view(W.shape)


def test_the_levels_are_those_of_the_published_code() -> None:
    """Quantiles of the normal distribution: eight steps to the one side, seven to the other, and zero."""
    assert len(NF4_LEVELS) == 16
    assert list(NF4_LEVELS) == sorted(NF4_LEVELS)
    offset = 1 - (1 / 32 + 1 / 30) / 2
    inverse = NormalDist().inv_cdf

    def steps(n: int) -> list[float]:
        return [inverse(offset + (0.5 - offset) * i / (n - 1)) for i in range(n - 1)]

    made = sorted([*steps(9), 0.0, *(-v for v in steps(8))])
    made = [v / max(made) for v in made]
    assert max(abs(a - b) for a, b in zip(made, NF4_LEVELS, strict=True)) < 2e-7
    assert all(torch.tensor(v).item() == v for v in NF4_LEVELS), "float32 holds each of them exactly"


def test_the_first_number_is_in_the_high_nibble() -> None:
    assert quantize_nf4(torch.zeros(2)).codes.tolist() == [0x77]
    assert quantize_nf4(torch.tensor([1.0, -1.0])).codes.tolist() == [0xF0]
    assert quantize_nf4(torch.tensor([-1.0, 1.0, 0.0])).codes.tolist() == [0x0F, 0x77]


@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("size", [(6, 8), (7, 9), (5,), (3, 64), (40, 33)])
def test_values_are_the_nearest_levels(size: tuple[int, ...], block: int) -> None:
    W = normal(*size, seed=3)
    packed = quantize_nf4(W, block, double_quant=False)
    torch.testing.assert_close(packed.dequantize(torch.float64), by_hand(W, block), rtol=1e-6, atol=1e-7)
    assert torch.equal(packed.values(), packed.dequantize())


@pytest.mark.parametrize("double_quant", [True, False])
def test_bits(double_quant: bool) -> None:
    packed = quantize_nf4(normal(1024, 1024), 64, double_quant)
    bits = 8 * (packed.nbytes - (4 if double_quant else 0)) / packed.numel  # the mean is one number a tensor
    assert bits == (4.126953125 if double_quant else 4.5)


@pytest.mark.parametrize(("block", "error"), [(32, 0.0872), (64, 0.0920), (128, 0.0957), (256, 0.0988)])
def test_the_error_on_normal_numbers(block: int, error: float) -> None:
    W = normal(1024, 1024)
    once = relative(W, quantize_nf4(W, block, double_quant=False))
    assert abs(once - error) < 2e-4
    assert abs(relative(W, quantize_nf4(W, block)) - once) < 1e-4


def test_the_largest_of_each_block_is_exact() -> None:
    W = normal(64, 64)
    values = quantize_nf4(W, double_quant=False).dequantize()
    largest = W.view(-1, 64).abs().argmax(-1, keepdim=True)
    assert torch.equal(values.view(-1, 64).gather(-1, largest), W.view(-1, 64).gather(-1, largest))


@pytest.mark.parametrize("size", [(64, 64), (7, 9)])
def test_quantising_again_changes_nothing(size: tuple[int, ...]) -> None:
    once = quantize_nf4(normal(*size), double_quant=False)
    again = quantize_nf4(once.dequantize(), double_quant=False)
    assert torch.equal(again.codes, once.codes)
    assert torch.equal(again.dequantize(), once.dequantize())


@pytest.mark.parametrize("double_quant", [True, False])
def test_blocks_of_zeros_stay_zero(double_quant: bool) -> None:
    W = normal(8, 64)
    W[2:4] = 0
    values = quantize_nf4(W, 64, double_quant).dequantize()
    assert not values[2:4].any()
    assert values[1].any()
    assert not quantize_nf4(torch.zeros(5, 7), 32, double_quant).dequantize().any()


def test_float64_is_coded_as_float32() -> None:
    W = torch.randn(65, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, other = quantize_nf4(W), quantize_nf4(W.float())
    assert all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())


def test_an_empty_tensor() -> None:
    packed = quantize_nf4(torch.empty(0, 4))
    assert packed.dequantize().shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_values_are_rounded_once_to_another_dtype(dtype: torch.dtype) -> None:
    packed = quantize_nf4(normal(300, 200))
    assert torch.equal(packed.dequantize(dtype), packed.dequantize().to(dtype))
    assert packed.dequantize(dtype).dtype is dtype


def test_rows_can_be_unpacked_alone() -> None:
    packed = quantize_nf4(normal(64, 48), 64)  # a row and a third of the next share a scale
    assert packed.step() == 4
    whole, ready = packed.dequantize(), packed.unpacked()
    for first in range(0, 64, packed.step()):
        out = torch.empty(4, 48)
        ready.fill(out, first)
        assert torch.equal(out, whole[first : first + 4])


def test_the_meta_device_gives_sizes() -> None:
    real, meta = quantize_nf4(normal(33, 48)), quantize_nf4(torch.empty(33, 48, device="meta"))
    assert {k: (t.shape, t.dtype) for k, t in real.tensors.items()} == {
        k: (t.shape, t.dtype) for k, t in meta.tensors.items()
    }
    assert meta.nbytes == real.nbytes
    assert meta.dequantize(torch.bfloat16).shape == (33, 48)


@pytest.mark.parametrize("block", [0, 16, 48, 8192, "64"])
def test_other_block_sizes_are_refused(block: int) -> None:
    with pytest.raises(ConfigError, match="32, 64"):
        quantize_nf4(torch.ones(4), block)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_what_is_not_finite_is_refused(bad: float, place: int) -> None:
    W = normal(100)
    W[place] = bad
    with pytest.raises(ConfigError, match="NaN"):
        quantize_nf4(W)


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------
def reference(codes: Tensor, state: object, dtype: torch.dtype) -> Tensor:
    """The values of bitsandbytes by its implementation in torch.

    Its CPU kernel (0.50) takes the scale of the wrong block where a row does not end with a block.
    """
    from bitsandbytes.backends.default import ops
    from bitsandbytes.functional import dequantize_blockwise

    absmax = state.absmax  # type: ignore[attr-defined]
    if state.nested:  # type: ignore[attr-defined]
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset  # type: ignore[attr-defined]
    compute = getattr(ops._dequantize_4bit_compute, "__wrapped__", ops._dequantize_4bit_compute)
    return compute(codes.reshape(-1), absmax, state.code, state.blocksize, state.shape, dtype)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_bitsandbytes_bit_for_bit(block: int, double_quant: bool, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for i, size in enumerate(SHAPES):
        W = normal(*size, seed=i, dtype=dtype) * (0.01 + i)
        if i == 5:
            W[:9] = 0
        codes, state = functional.quantize_4bit(
            W, blocksize=block, quant_type="nf4", compress_statistics=double_quant
        )
        ours = quantize_nf4(W, block, double_quant)
        assert torch.equal(ours.codes, codes.view(-1))
        assert torch.equal(ours.absmax, state.absmax)
        if double_quant:
            assert ours.absmax_scale is not None
            assert ours.absmax_mean is not None
            assert torch.equal(ours.absmax_scale, state.state2.absmax)
            assert torch.equal(ours.absmax_mean, state.offset)
        assert torch.equal(ours.dequantize(dtype), reference(codes, state, dtype))
        if size[-1] % block == 0:
            assert torch.equal(ours.dequantize(dtype), functional.dequantize_4bit(codes, state))


def test_where_the_cpu_kernel_of_bitsandbytes_is_wrong() -> None:
    """Rows of 96 numbers and blocks of 64: its own two implementations differ, and ours is the one that is near."""
    functional = pytest.importorskip("bitsandbytes.functional")
    W = normal(100, 96)
    codes, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
    assert relative(W, quantize_nf4(W, 64, False)) < 0.1
    kernel = functional.dequantize_4bit(codes, state)
    if torch.equal(kernel, reference(codes, state, torch.float32)):
        pytest.skip("this build of bitsandbytes has no such kernel")
    assert float((W - kernel).norm() / W.norm()) > 0.2
