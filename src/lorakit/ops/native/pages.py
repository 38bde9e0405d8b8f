"""Memory in large pages, for what is read from end to end again and again.

From pages of 4 KB a processor reads a little slower than from pages of 2 MB: it has to look up where each of them lies,
and its own reading ahead ends with the page.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

_LEAST = 4 << 20  # bytes of a room of its own; less is left to malloc
_ALIGNED = 64


def room(size: int) -> Tensor:
    """Uninitialised bytes ``(size,)``: in large pages, as far as the system has them."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < _LEAST:
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        pages.madvise(advice)
    return torch.frombuffer(pages, dtype=torch.uint8)


class Together:
    """Tensors that are given room one behind the other.

    Args:
        size: Bytes of a room; a tensor that is larger gets one of its own.
    """

    def __init__(self, size: int = 64 << 20) -> None:
        self._size = size
        self._left = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape) * dtype.itemsize
        taken = -(-size // _ALIGNED) * _ALIGNED
        if taken > self._left.numel():
            self._left = room(max(taken, self._size))
        mine, self._left = self._left[:size], self._left[taken:]
        return mine.view(dtype).view(shape)

    def copied(self, tensor: Tensor) -> Tensor:
        """A contiguous copy."""
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)
