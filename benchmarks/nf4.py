"""What do NF4 and int8 weights cost on the CPU beside bitsandbytes: coding, decoding, and the product with T tokens?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import LORAKIT, Aim, Benchmark, start
from benchmarks.subjects import check_equal
from lorakit.ops import packed_linear, quantize_int8, quantize_nf4

BITSANDBYTES = "bitsandbytes"
WIDTHS, TOKENS = (1024, 4096), (1, 16, 128)
EQUAL = Aim("ratio", ">=", 1.0)


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("nf4", __doc__ or "", argv)
    for width in WIDTHS:
        W = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
        nf4(bench, W)
        int8(bench, W)
    bench.finish()
    return bench


def nf4(bench: Benchmark, W: Tensor) -> None:
    """Blocks of 64 with double quantisation, in float32 and bfloat16."""
    from bitsandbytes import functional, matmul_4bit

    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    width = W.shape[0]
    compare(
        bench,
        f"NF4 coding, {width} x {width}",
        {LORAKIT: lambda: quantize_nf4(W), BITSANDBYTES: lambda: functional.quantize_4bit(W, **options)},
    )
    for dtype in (torch.float32, torch.bfloat16):
        word = f"{width} x {width}, {str(dtype).removeprefix('torch.')}"
        ours = quantize_nf4(W.to(dtype))
        codes, state = functional.quantize_4bit(W.to(dtype), **options)
        assert torch.equal(ours.dequantize(dtype), functional.dequantize_4bit(codes, state)), "other values"
        compare(
            bench,
            f"NF4 decoding, {word}",
            {
                LORAKIT: lambda ours=ours, dtype=dtype: ours.dequantize(dtype),
                BITSANDBYTES: lambda codes=codes, state=state: functional.dequantize_4bit(codes, state),
            },
        )
        for tokens in TOKENS:
            x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype)
            sides = {
                LORAKIT: lambda x=x, ours=ours: packed_linear(x, ours),
                BITSANDBYTES: lambda x=x, codes=codes, state=state: matmul_4bit(x, codes, quant_state=state),
            }
            if dtype is torch.float32:
                check_equal(sides[LORAKIT](), sides[BITSANDBYTES](), "the product with NF4")
            compare(bench, f"NF4 product, T={tokens}, {word}", sides)


def int8(bench: Benchmark, W: Tensor) -> None:
    """One scale a row; the product is that of bitsandbytes' layer in training, where it does not round its input."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    width = W.shape[0]
    word = f"{width} x {width}"
    ours = quantize_int8(W)
    layer: nn.Module = Linear8bitLt(width, width, bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(W.clone(), requires_grad=False).to(
        "cpu"
    )  # from float16, so other codes than ours
    layer.train()
    compare(
        bench,
        f"int8 coding, {word}",
        {LORAKIT: lambda: quantize_int8(W), BITSANDBYTES: lambda: functional.int8_vectorwise_quant(W)},
    )
    compare(
        bench,
        f"int8 decoding, {word}",
        {
            LORAKIT: ours.dequantize,
            BITSANDBYTES: lambda: functional.int8_vectorwise_dequant(ours.codes, ours.absmax),
        },
    )
    for tokens in TOKENS:
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
        compare(
            bench,
            f"int8 product, T={tokens}, {word}",
            {
                LORAKIT: lambda x=x: packed_linear(x, ours),
                BITSANDBYTES: lambda x=x: layer(x),
            },
        )


def compare(bench: Benchmark, name: str, sides: dict[str, Any]) -> None:
    """One line: how many times less than bitsandbytes it costs."""
    with torch.no_grad():
        samples = bench.measure(sides, rounds=20)
    bench.add(name, samples, ratio=(BITSANDBYTES, LORAKIT), aim=EQUAL, drawn=False)


if __name__ == "__main__":
    main()
