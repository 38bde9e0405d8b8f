"""Matrices kept in few bits: what all such forms share, and their product ``x Wᵀ``.

The product never holds the dense matrix: it unpacks some rows at a time, few enough to stay in the cache, multiplies
by them and forgets them. Its backward pass unpacks them again, so that what is kept between the two passes is the codes
and scales, which the layer holds anyway. The codes are constants: a gradient flows through the values to ``x`` only.
Source: Dettmers et al. 2023 (arXiv 2305.14314), equation 5.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops.low_rank import transformed

# Numbers unpacked at a time (a megabyte as float32). With more than a few rows of x the product itself is what counts,
# and tiles of so many rows make it faster, up to four megabytes (measured on CPU).
_TILE, _WIDE_TILE, _TILE_ROWS, _SOME_ROWS = 2**18, 2**20, 256, 16
_ACCELERATOR_TILE = 2**25
# Up to so many rows of x in half precision, casting them and the result costs next to nothing, and a product in float32
# is the faster one, even where the processor multiplies bfloat16 (measured on CPU with AVX512-BF16).
_FEW_ROWS = 128


class Packed(ABC):
    """A tensor in few bits a number, with the scales that give its values back.

    Attributes:
        size: The size of the dense tensor; a product takes it as ``(out, in)``.
    """

    fields: ClassVar[tuple[str, ...]]
    size: tuple[int, ...]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, by name."""
        return {name: t for name in self.fields if (t := getattr(self, name)) is not None}

    @property
    def numel(self) -> int:
        """Numbers in the dense tensor."""
        return math.prod(self.size)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @abstractmethod
    def unpacked(self) -> Packed:
        """The same values with scales that are ready to multiply with."""

    @abstractmethod
    def step(self) -> int:
        """How many rows may be unpacked without the others: any multiple of this many, counted from the first."""

    @abstractmethod
    def fill(self, out: Tensor, start: int) -> None:
        """Of an ``unpacked`` one: write the values from row ``start`` on into ``out``, contiguous float32 rows."""

    def fill_compiled(self, out: Tensor, start: int) -> bool:
        """Do what ``fill`` does in one compiled call, for other dtypes of ``out`` too; or nothing, and say False."""
        return False

    @abstractmethod
    def values(self) -> Tensor:
        """All values as float32, in plain operations that a compiler or ``torch.func`` sees through."""

    @abstractmethod
    def with_tensors(self, tensors: dict[str, Tensor]) -> Packed:
        """The same form with other stored tensors."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense values, computed in float32 and rounded once to ``dtype``."""
        if transformed() or self.tensors["codes"].is_meta:
            return self.values().to(dtype)
        with torch.no_grad():
            ready = self.unpacked()
            rows, width = _as_rows(self.size)
            device = self.tensors["codes"].device
            result = torch.empty((rows, width), dtype=dtype, device=device)
            most = _at_a_time(device)
            if not ready.fill_compiled(result, 0):
                for first, last in _spans(rows, width, ready.step(), most):
                    _write(ready, result[first:last], first)
            return result.view(self.size)

    def tiles(self, dtype: torch.dtype, rows_of_x: int) -> Iterator[tuple[int, int, Tensor]]:
        """Some rows after others, as (first, last, values): one buffer, written anew for each."""
        rows, width = self.size
        most = _at_a_time(self.tensors["codes"].device, width, rows_of_x)
        ready, device = self.unpacked(), self.tensors["codes"].device
        buffer: Tensor | None = None
        for first, last in _spans(rows, width, ready.step(), most):
            if buffer is None:
                buffer = scratch("tile", (last - first) * width, dtype, device).view(last - first, width)
            tile = buffer[: last - first]
            _write(ready, tile, first)
            yield first, last, tile


_ROOM = threading.local()


def scratch(what: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory to write to and read from at once: on the CPU the same for every call of a thread that needs as little.

    New memory for each tile would cost as much as what is written to it: the system hands it out page by page.
    """
    if device.type != "cpu" or size > _TILE:
        return torch.empty(size, dtype=dtype, device=device)
    key = f"{what} {dtype}"
    held: Tensor | None = getattr(_ROOM, key, None)
    if held is None:
        with torch.inference_mode(False):
            held = torch.empty(_TILE, dtype=dtype, device="cpu")
        setattr(_ROOM, key, held)
    return held[:size]


def packed_linear(x: Tensor, W: Packed, bias: Tensor | None = None) -> Tensor:
    """Return ``x Wᵀ + bias`` in the dtype of ``x``, differentiable in ``x`` and ``bias``.

    Args:
        x: ``(..., in)``, floating-point.
        W: A packed matrix ``(out, in)``, on the device of ``x``.
        bias: ``(out,)``, or None.
    """
    if transformed() or x.is_meta:
        return F.linear(x, W.dequantize(x.dtype), bias)
    if x.shape[-1] != W.size[1]:
        raise RuntimeError(
            f"This layer maps {W.size[1]} features to {W.size[0]}; its input has size {tuple(x.shape)}."
        )
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and x.requires_grad:
        y = _Product.apply(rows, W, False, *W.tensors.values())
    else:
        y = _product(rows, W)
    y = y.view(*x.shape[:-1], W.size[0])
    return y if bias is None else y.add_(bias)


def _product(x: Tensor, W: Packed) -> Tensor:
    """``x Wᵀ`` for ``x`` ``(T, in)``."""
    if x.dtype.itemsize < 4 and x.shape[0] <= _FEW_ROWS and x.device.type == "cpu":
        return _product(x.float(), W).to(x.dtype)
    y = x.new_empty(x.shape[0], W.size[0])
    with torch.no_grad():
        for first, last, tile in W.tiles(x.dtype, x.shape[0]):
            torch.mm(x, tile.t(), out=y[:, first:last])
    return y


def _transposed_product(g: Tensor, W: Packed) -> Tensor:
    """``g W`` for ``g`` ``(T, out)``."""
    if g.dtype.itemsize < 4:  # a sum over tiles would be rounded at each of them
        return g @ W.dequantize(g.dtype)
    x = g.new_zeros(g.shape[0], W.size[1])
    with torch.no_grad():
        for first, last, tile in W.tiles(g.dtype, g.shape[0]):
            x.addmm_(g[:, first:last], tile)
    return x


class _Product(torch.autograd.Function):
    """``x Wᵀ``, or with ``transposed`` ``x W``: each is the other's backward pass, so any derivative can be taken."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Packed, transposed: bool, *stored: Tensor) -> Tensor:
        ctx.W, ctx.transposed = W.with_tensors({}), transposed
        ctx.names = tuple(W.tensors)
        ctx.save_for_backward(*stored)
        return _transposed_product(x, W) if transposed else _product(x, W)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        stored = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            W = ctx.W.with_tensors(dict(zip(ctx.names, stored, strict=True)))
            dx = _Product.apply(grad, W, not ctx.transposed, *stored)
        return dx, None, None, *(None for _ in stored)


def _at_a_time(device: torch.device, width: int = 0, rows_of_x: int = 0) -> int:
    """How many numbers to unpack before they are used; on an accelerator, which has no such cache, a large part."""
    if device.type != "cpu":
        return _ACCELERATOR_TILE
    if rows_of_x < _SOME_ROWS:
        return _TILE
    return min(max(_TILE, _TILE_ROWS * width), _WIDE_TILE)


def _as_rows(size: tuple[int, ...]) -> tuple[int, int]:
    width = size[-1] if size else 1
    return math.prod(size[:-1]), width


def _spans(rows: int, width: int, step: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut rows into spans of about ``most`` numbers, each starting at a multiple of ``step``."""
    span = max(1, most // max(1, width * step)) * step
    for first in range(0, rows, span):
        yield first, min(first + span, rows)


def _write(ready: Packed, out: Tensor, start: int) -> None:
    """The values from row ``start`` on into ``out``, contiguous rows of any dtype; rounded once."""
    if ready.fill_compiled(out, start):
        return
    if out.dtype is torch.float32:
        ready.fill(out, start)
        return
    rows, width = out.shape
    for first, last in _spans(rows, width, ready.step(), _at_a_time(out.device)):
        wide = scratch("wide", (last - first) * width, torch.float32, out.device).view(last - first, width)
        ready.fill(wide, start + first)
        out[first:last] = wide
