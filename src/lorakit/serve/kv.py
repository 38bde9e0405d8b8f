"""The keys and values of all running requests, in one allocation.

A request gets a contiguous range of tokens, its *slab*, when it is admitted: of its prompt and everything it may still
write. So a step never allocates, and no running request can be pushed out by another.
"""

from __future__ import annotations

import bisect
import threading

import torch
from torch import Tensor

from lorakit.errors import ConfigError

BLOCK = 64
"""Slabs start and end at multiples of this many tokens."""


def rounded(tokens: int) -> int:
    """The size of the slab that holds so many tokens."""
    return -(-tokens // BLOCK) * BLOCK


class Slab:
    """A range of the arena that belongs to one request.

    Attributes:
        start: Its first token in the arena.
        size: How many tokens it holds.
    """

    __slots__ = ("_arena", "_free", "size", "start")

    def __init__(self, arena: KVArena, start: int, size: int) -> None:
        self._arena, self.start, self.size, self._free = arena, start, size, False

    def __repr__(self) -> str:
        return f"Slab({self.start}:{self.start + self.size})"

    def keys(self, layer: int, tokens: int) -> Tensor:
        """The first ``tokens`` keys of a layer, ``(kv_heads, tokens, head_dim)``: a view."""
        return self._arena.keys[layer, :, self.start : self.start + tokens]

    def values(self, layer: int, tokens: int) -> Tensor:
        """The first ``tokens`` values of a layer, ``(kv_heads, tokens, head_dim)``: a view."""
        return self._arena.values[layer, :, self.start : self.start + tokens]

    def read(self, start: int, end: int) -> Tensor:
        """A copy of the keys and values of tokens ``start`` to ``end``: ``(2, layers, kv_heads, tokens, head_dim)``."""
        part = slice(self.start + start, self.start + end)
        return torch.stack([self._arena.keys[:, :, part], self._arena.values[:, :, part]])

    def write(self, start: int, content: Tensor) -> None:
        """Put what ``read`` gave at the tokens from ``start`` on."""
        part = slice(self.start + start, self.start + start + content.shape[3])
        self._arena.keys[:, :, part] = content[0]
        self._arena.values[:, :, part] = content[1]

    def copy_from(self, other: Slab, tokens: int) -> None:
        """Take over the first ``tokens`` keys and values of another slab.

        Whole blocks are copied: inside a block a runner may keep its keys in another order.
        """
        arena, tokens = self._arena, min(rounded(tokens), self.size, other.size)
        for whole in (arena.keys, arena.values):
            whole[:, :, self.start : self.start + tokens] = whole[:, :, other.start : other.start + tokens]

    def free(self) -> None:
        """Give the range back. A second call does nothing."""
        if not self._free:
            self._free = True
            self._arena._release(self)


class KVArena:
    """Room for the keys and values of ``capacity`` tokens in all layers, handed out in slabs.

    Attributes:
        keys: ``(layers, kv_heads, capacity, head_dim)``.
        values: The same.
        capacity: Tokens, a multiple of `BLOCK`.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate it.

        Args:
            layers: Layers of the model.
            kv_heads: Heads of keys and values.
            head_dim: Their width.
            capacity_tokens: Tokens in all, rounded down to a multiple of `BLOCK`.
            dtype: Of keys and values.
            device: Where they are.

        Raises:
            ConfigError: Not even one block fits.
        """
        if capacity_tokens < BLOCK:
            raise ConfigError(
                f"A KV cache of {capacity_tokens} tokens was asked for; the least is {BLOCK} tokens."
            )
        self.capacity = capacity_tokens // BLOCK * BLOCK
        shape = (layers, kv_heads, self.capacity, head_dim)
        # Not zeroed: the memory is taken from the system when it is first written.
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._holes = [(0, self.capacity)]  # (start, size), by start, never adjacent
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Tokens in slabs that are handed out."""
        with self._lock:
            return self.capacity - sum(size for _, size in self._holes)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values together."""
        return 2 * self.keys.numel() * self.keys.element_size()

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes."""
        return self.nbytes // self.capacity

    def reserve(self, tokens: int) -> Slab | None:
        """The first range that holds ``tokens``, or None while there is none: wait until one is freed.

        Raises:
            ConfigError: It could never fit, or is no number of tokens.
        """
        size = rounded(tokens)
        if not 0 < size <= self.capacity:
            raise ConfigError(
                f"{tokens} tokens of KV cache were asked for; the whole cache holds {self.capacity}."
            )
        with self._lock:
            for i, (start, room) in enumerate(self._holes):
                if room >= size:
                    if room == size:
                        del self._holes[i]
                    else:
                        self._holes[i] = (start + size, room - size)
                    return Slab(self, start, size)
        return None

    def _release(self, slab: Slab) -> None:
        with self._lock:
            i = bisect.bisect(self._holes, (slab.start, slab.size))
            start, end = slab.start, slab.start + slab.size
            if i < len(self._holes) and self._holes[i][0] == end:
                end += self._holes.pop(i)[1]
            if i and sum(self._holes[i - 1]) == start:
                i -= 1
                start = self._holes.pop(i)[0]
            self._holes.insert(i, (start, end - start))
