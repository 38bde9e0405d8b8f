"""NF4: four bits a number, on 16 levels that are equally likely for normally distributed weights.

Blocks of consecutive numbers (of the row-major tensor) are divided by their largest magnitude, the *absmax*, and
rounded to the nearest level. Two codes share a byte, the first in the high nibble. With *double quantisation* the
absmaxes less their mean are kept in eight bits (`lorakit.ops.dynamic_map`): 4.127 bits a number instead of 4.5. Codes,
scales and values are those of bitsandbytes bit for bit.
Source: Dettmers et al. 2023 (arXiv 2305.14314), section 3. The levels are those of the published code: equation 4 of
the paper gives another, symmetric table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.errors import ConfigError
from lorakit.ops.dynamic_map import dequantize_dynamic, quantize_dynamic
from lorakit.ops.native import load as native
from lorakit.ops.packed import Packed, scratch

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# A block that has nothing but zeros is divided by this.
_TINY = 1e-38
# Numbers coded at a time: they and what is made of them stay in the cache.
_CHUNK = 2**17


@dataclass(frozen=True, eq=False)
class NF4(Packed):
    """A tensor in NF4.

    Attributes:
        codes: ``(ceil(n / 2),)`` uint8, two codes a byte.
        absmax: ``(blocks,)``: float32, or uint8 when it is itself quantised.
        absmax_scale: Scales of the quantised ``absmax``, ``(ceil(blocks / 256),)`` float32, or None.
        absmax_mean: What was subtracted from ``absmax`` before it was quantised, a float32 scalar, or None.
        size: Of the dense tensor.
        block: Numbers that share a scale.
    """

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_mean: Tensor | None
    size: tuple[int, ...]
    block: int = 64

    fields: ClassVar[tuple[str, ...]] = ("codes", "absmax", "absmax_scale", "absmax_mean")

    def with_tensors(self, tensors: dict[str, Tensor]) -> NF4:
        """The same form with other stored tensors."""
        return replace(self, **{name: tensors.get(name) for name in self.fields})  # type: ignore[arg-type]

    def scales(self) -> Tensor:
        """The absmax of every block, float32."""
        if self.absmax_scale is None or self.absmax_mean is None:
            return self.absmax
        return dequantize_dynamic(self.absmax, self.absmax_scale).add_(self.absmax_mean)

    def unpacked(self) -> NF4:
        """With scales that are ready to multiply with."""
        return replace(self, absmax=self.scales(), absmax_scale=None, absmax_mean=None)

    def step(self) -> int:
        """Rows after which a row starts with a new block."""
        return self.block // math.gcd(self.block, max(1, self.size[-1] if self.size else 1))

    def fill_compiled(self, out: Tensor, start: int) -> bool:
        """On a CPU with the compiled library: float32 and bfloat16."""
        decode = native.decode_nf4
        if decode is None:
            return False
        first = start * (self.size[-1] if self.size else 1)
        return decode(self.codes, self.absmax, out, first, self.block) is not None

    def fill(self, out: Tensor, start: int) -> None:
        """Look up two levels for each byte, and multiply by the scales of the blocks."""
        flat = out.view(-1)
        n, first = flat.numel(), start * (self.size[-1] if self.size else 1)
        pairs = _pairs(out.device)
        full = n - n % 2
        codes = scratch("codes", (n + 1) // 2, torch.int32, out.device)
        codes.copy_(self.codes[first // 2 : (first + n + 1) // 2])
        if full:
            torch.index_select(pairs, 0, codes[: full // 2], out=flat[:full].view(torch.int64))
        if full < n:
            last = int(codes[-1])
            flat[full] = pairs[last : last + 1].view(torch.float32)[0]
        block = first // self.block
        blocks, rest = divmod(n, self.block)
        if blocks:
            body = flat[: blocks * self.block].view(blocks, self.block)
            body.mul_(self.absmax[block : block + blocks].unsqueeze(-1))
        if rest:
            flat[blocks * self.block :].mul_(self.absmax[block + blocks])

    def values(self) -> Tensor:
        """The same in plain operations."""
        levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=self.codes.device)
        codes = torch.stack((self.codes >> 4, self.codes & 15), -1).view(-1)[: self.numel]
        scales = self.scales().repeat_interleave(self.block)[: self.numel]
        return (levels.index_select(0, codes.int()) * scales).view(self.size)


def quantize_nf4(W: Tensor, block: int = 64, double_quant: bool = True) -> NF4:
    """Code a tensor in NF4. Lossy: for normally distributed numbers the error is 9.2 % of their norm at block 64.

    Args:
        W: Floating-point, any size; computed in float32.
        block: Numbers that share a scale: 32, 64, ... 4096. The last block may be short.
        double_quant: Keep the scales in eight bits.

    Raises:
        ConfigError: The block size is not one of those, or a value is not finite.
    """
    if block not in BLOCK_SIZES:
        raise ConfigError(
            f"NF4 takes blocks of {', '.join(map(str, BLOCK_SIZES))} numbers; got block={block!r}."
        )
    n = W.numel()
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=W.device)
    absmax = torch.empty(-(-n // block), dtype=torch.float32, device=W.device)
    with torch.no_grad():
        if not W.is_meta:
            _code(W.detach().reshape(-1), block, codes, absmax)
            if n and not math.isfinite(float(absmax.sum())):
                raise ConfigError("NF4 cannot hold a NaN or an infinity, and this tensor has one.")
        if not double_quant or not n:
            return NF4(codes, absmax, None, None, tuple(W.shape), block)
        if W.is_meta:
            scales = absmax.new_empty(-(-absmax.numel() // 256))
            return NF4(codes, absmax.to(torch.uint8), scales, absmax.new_empty(()), tuple(W.shape), block)
        mean = absmax.mean()
        absmax8, scales = quantize_dynamic(absmax - mean)
        return NF4(codes, absmax8, scales, mean, tuple(W.shape), block)


def _code(flat: Tensor, block: int, codes: Tensor, absmax: Tensor) -> None:
    """Fill codes and scales, some blocks at a time."""
    n = flat.numel()
    whole = n - n % block
    chunk = (
        min(max(_CHUNK // block, 1) * block, max(whole, 1)) if flat.device.type == "cpu" else max(whole, 1)
    )
    scaled, above, code = (torch.empty(chunk, dtype=torch.float32, device=flat.device) for _ in range(3))
    for start in range(0, whole, chunk):
        size = min(chunk, whole - start)
        part, s = flat[start : start + size].view(-1, block).float(), scaled[:size].view(-1, block)
        of_blocks = absmax[start // block : (start + size) // block]
        torch.abs(part, out=s)
        torch.amax(s, -1, out=of_blocks)
        torch.mul(part, of_blocks.clamp(min=_TINY).reciprocal_().unsqueeze(-1), out=s)
        _levels(scaled[:size], above[:size], code[:size])
        _pack(code[:size], codes[start // 2 : (start + size) // 2])
    if whole < n:
        rest = flat[whole:].float()
        absmax[-1] = rest.abs().max().clamp(min=_TINY)
        # An odd number of codes is filled up with that of zero.
        last = torch.zeros(rest.numel() + n % 2, dtype=torch.float32, device=flat.device)
        torch.div(rest, absmax[-1], out=last[: rest.numel()])
        code = torch.empty_like(last)
        _levels(last, torch.empty_like(last), code)
        _pack(code, codes[whole // 2 :])


def _levels(scaled: Tensor, above: Tensor, code: Tensor) -> None:
    """The index of the nearest level: how many of the 15 boundaries lie below.

    Float comparisons of a chunk in the cache are several times faster than one binary search for each number.
    """
    code.zero_()
    for boundary in _boundaries():
        code.add_(torch.gt(scaled, boundary, out=above))


def _pack(code: Tensor, out: Tensor) -> None:
    """Two codes a byte, the first in the high nibble."""
    pairs = code.to(torch.uint8).view(-1, 2)
    torch.bitwise_or(pairs[:, 0] << 4, pairs[:, 1], out=out)


@cache
def _boundaries() -> tuple[float, ...]:
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device="cpu")
    return tuple(((levels[:-1] + levels[1:]) / 2).tolist())


@cache
def _pairs(device: torch.device) -> Tensor:
    """For each byte its two float32 levels, seen as one number of eight bytes: a lookup then moves both at once."""
    with torch.inference_mode(False):
        levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device="cpu")
        byte = torch.arange(256, device="cpu")
        return torch.stack((levels[byte >> 4], levels[byte & 15]), -1).view(torch.int64).view(-1).to(device)
