"""The compiled decoding of NF4: the values of the plain operations, bit for bit, and out of the way elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.ops import packed_linear
from lorakit.ops.native import load
from lorakit.ops.native.check import check_nf4
from lorakit.ops.native.load import Decode
from lorakit.ops.nf4 import BLOCK_SIZES, NF4, quantize_nf4

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rows that end with a block and rows that do not, odd numbers, less than a vector, work for several threads.
SIZES = [(1,), (1, 1), (3, 5), (5, 31), (7, 9), (33, 48), (100, 130), (31, 777), (300, 1024), (257, 2051)]


@pytest.fixture
def decode(library: load.Library) -> Decode:
    """The compiled decoding."""
    return library.decode_nf4


class Calls:
    """What stands in the place of the library's function, and counts."""

    def __init__(self, decode: Decode) -> None:
        self.decode, self.taken, self.refused = decode, 0, 0

    def __call__(self, codes: Tensor, absmax: Tensor, out: Tensor, first: int, block: int) -> Tensor | None:
        done = self.decode(codes, absmax, out, first, block)
        self.taken += done is not None
        self.refused += done is None
        return done


@pytest.fixture
def calls(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls(decode)
    monkeypatch.setattr(load, "decode_nf4", counted)
    return counted


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def plainly(packed: NF4, dtype: torch.dtype) -> Tensor:
    """Through the operations of torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "decode_nf4", None)
        return packed.dequantize(dtype)


def bits(t: Tensor) -> Tensor:
    """So that -0 is not 0."""
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_values_are_those_of_the_plain_operations(
    calls: Calls, block: int, dtype: torch.dtype, double_quant: bool
) -> None:
    for size in SIZES:
        packed = quantize_nf4(normal(*size), block, double_quant)
        got = packed.dequantize(dtype)
        assert got.dtype is dtype
        assert got.shape == size
        assert torch.equal(bits(got), bits(plainly(packed, dtype))), size
    expected = len(SIZES) if dtype in (torch.float32, torch.bfloat16) else 0
    assert calls.taken == expected


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_byte_and_every_kind_of_scale(calls: Calls, dtype: torch.dtype) -> None:
    """Rounding to bfloat16 of ties, of numbers too large and too small for it; NaN and infinity pass through."""
    scales = torch.tensor([1.0, 1e-38, 1e-41, 3.4e38, 1.00390625, 0.0, torch.inf, torch.nan])
    strange = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(
        torch.float32
    )  # NaNs that rounding up would lose
    scales = torch.cat([scales, -scales, strange, normal(1000)])
    packed = NF4(
        torch.arange(256).repeat(len(scales)).byte(), scales, None, None, (len(scales), 512), block=512
    )
    got, expected = packed.dequantize(dtype), plainly(packed, dtype)
    assert calls.taken == 1
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert bool(nan.any())
    assert torch.equal(bits(got)[~nan], bits(expected)[~nan])


def test_a_nan_in_a_short_block_passes_through(calls: Calls) -> None:
    packed = quantize_nf4(normal(70), 64, double_quant=False)
    packed.absmax[-1] = torch.nan
    for dtype in DTYPES[:2]:
        assert packed.dequantize(dtype).isnan().tolist() == [False] * 64 + [True] * 6
    assert calls.taken == 2


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 17, 128])
@pytest.mark.parametrize("size", [(48, 33), (700, 1024), (1500, 1030)], ids=str)
def test_products(calls: Calls, size: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    """Of the same tiles, so the same to the bit; and so is the gradient."""
    packed = quantize_nf4(normal(*size))
    x = normal(tokens, size[1], seed=1).to(dtype).requires_grad_()
    y = packed_linear(x, packed)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert calls.taken >= 2
    assert calls.refused == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "decode_nf4", None)
        plain = packed_linear(x, packed)
        (plain_dx,) = torch.autograd.grad(plain, x, torch.ones_like(y))
    assert torch.equal(y, plain)
    assert torch.equal(dx, plain_dx)


def test_threads_change_nothing(calls: Calls) -> None:
    packed = quantize_nf4(normal(1001, 1003))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(packed.dequantize(torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert calls.taken == 2
    assert torch.equal(*results)


def test_what_is_not_there_is_not_read(decode: Decode) -> None:
    packed = quantize_nf4(normal(4, 64), 64, double_quant=False)
    codes, absmax = packed.codes, packed.absmax
    out = torch.zeros(2, 64)
    assert decode(codes, absmax, out, 128, 64) is out
    assert torch.equal(out, packed.dequantize()[2:])
    refused = {
        "past the end": (codes, absmax, out, 192, 64),
        "too few codes": (codes[:63], absmax, out, 0, 64),
        "too few scales": (codes, absmax[:1], out, 0, 64),
        "in the middle of a block": (codes, absmax, out, 32, 64),
        "before the start": (codes, absmax, out, -64, 64),
        "an odd block": (codes, absmax, out, 0, 33),
        "no block": (codes, absmax, out, 0, 0),
        "codes with gaps": (torch.zeros(256, dtype=torch.uint8)[::2], absmax, out, 0, 64),
        "a transposed result": (codes, absmax, torch.zeros(64, 2).T, 0, 64),
        "float16": (codes, absmax, out.half(), 0, 64),
        "coded scales": (codes, absmax.byte(), out, 0, 64),
        "meta": (codes, absmax, out.to("meta"), 0, 64),
        "a parameter's subclass": (codes, absmax, torch.nn.Buffer(out).as_subclass(type("Own", (Tensor,), {})), 0, 64),
    }  # fmt: skip
    for why, arguments in refused.items():
        before = out.clone()
        assert decode(*arguments) is None, why
        assert torch.equal(out, before), why


def test_who_watches_the_operations_sees_them(calls: Calls) -> None:
    class Watching(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            Watching.seen += 1
            return function(*arguments, **(options or {}))

    packed = quantize_nf4(normal(32, 64))
    with Watching():
        watched = packed.dequantize()
    assert Watching.seen > 5
    assert calls.taken == 0
    assert torch.equal(watched, packed.dequantize())


def test_torch_func_and_a_compiler_see_plain_operations(calls: Calls) -> None:
    packed = quantize_nf4(normal(32, 64))
    x = normal(3, 64)
    expected = packed_linear(x, packed)
    taken = calls.taken
    assert taken
    torch.testing.assert_close(torch.vmap(lambda row: packed_linear(row, packed))(x), expected)
    compiled = torch.compile(lambda x: packed_linear(x, packed), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert calls.taken == taken


def test_it_is_found_at_the_first_use(decode: Decode, resolve_again: None) -> None:
    load.forget()
    packed = quantize_nf4(normal(32, 64))
    packed.dequantize()
    assert load.status().state == "compiled"
    assert load.decode_nf4 is not None
    assert load.decode_nf4 is not load._look_first_for_nf4


def test_it_can_be_switched_off(decode: Decode, monkeypatch: pytest.MonkeyPatch, resolve_again: None) -> None:
    packed = quantize_nf4(normal(32, 64))
    expected = packed.dequantize()
    monkeypatch.setenv(load.SWITCH, "off")
    load.forget()
    assert torch.equal(packed.dequantize(), expected)
    assert load.decode_nf4 is None


def test_the_check_after_the_build_finds_wrong_values(decode: Decode) -> None:
    check_nf4(decode)

    def one_off(codes: Tensor, absmax: Tensor, out: Tensor, first: int, block: int) -> Tensor | None:
        done = decode(codes, absmax, out, first, block)
        if done is not None:
            done.view(-1)[-1] *= 1.01
        return done

    for wrong in (one_off, lambda *_: None):
        with pytest.raises(AssertionError):
            check_nf4(wrong)
