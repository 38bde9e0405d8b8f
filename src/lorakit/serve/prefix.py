"""The prefix cache: keys and values of prompts' beginnings, kept for the next prompt that begins alike.

A block of 64 tokens is found by the hash of everything that its keys and values depend on: the base, the adapter's
content, whose it is, and all tokens up to its end. So a block of another adapter or tenant is never even looked for.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lorakit.serve.kv import BLOCK, Slab


class PrefixStatistics(NamedTuple):
    """What the cache has done: tokens asked for, tokens found, blocks and bytes held, blocks evicted."""

    queried: int
    hit: int
    blocks: int
    bytes: int
    evicted: int


class _Block(NamedTuple):
    content: Tensor
    digest: str | None


class PrefixCache:
    """Blocks of keys and values under a byte budget, the least recently used ones leave first. For one thread."""

    def __init__(self, most_bytes: int, base: str = "") -> None:
        """Make an empty one.

        Args:
            most_bytes: The most that all blocks may take.
            base: What tells the base model from others.
        """
        self._most, self._base = most_bytes, base
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        self._bytes = self._queried = self._hit = self._evicted = 0

    @property
    def statistics(self) -> PrefixStatistics:
        """What it has done so far."""
        return PrefixStatistics(self._queried, self._hit, len(self._blocks), self._bytes, self._evicted)

    def fetch(self, prompt: Sequence[int], digest: str | None, tenant: str | None, slab: Slab) -> int:
        """Copy what is there of a prompt's beginning to a slab.

        The last token is never among it: its logits are needed, and they are not kept.

        Returns:
            Tokens copied.
        """
        keys = self._keys(prompt, digest, tenant, (len(prompt) - 1) // BLOCK)
        self._queried += len(prompt)
        found = 0
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            slab.write(found * BLOCK, block.content)
            found += 1
        self._touch(keys[:found])
        self._hit += found * BLOCK
        return found * BLOCK

    def keep(self, prompt: Sequence[int], digest: str | None, tenant: str | None, slab: Slab) -> None:
        """Keep the whole blocks of a prompt that a slab now holds."""
        keys = self._keys(prompt, digest, tenant, len(prompt) // BLOCK)
        for i, key in enumerate(keys):
            if key not in self._blocks:
                content = slab.read(i * BLOCK, (i + 1) * BLOCK)
                self._blocks[key] = _Block(content, digest)
                self._bytes += content.nbytes
        self._touch(keys)
        while self._bytes > self._most:
            self._drop(next(iter(self._blocks)))
            self._evicted += 1

    def forget(self, digest: str) -> None:
        """Drop the blocks of an adapter."""
        for key in [key for key, block in self._blocks.items() if block.digest == digest]:
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        self._bytes -= self._blocks.pop(key).content.nbytes

    def _touch(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):  # a block is of no use without those before it, so it has to leave first
            self._blocks.move_to_end(key)

    def _keys(
        self, prompt: Sequence[int], digest: str | None, tenant: str | None, blocks: int
    ) -> list[bytes]:
        """The hashes of a prompt's first blocks, each over all tokens so far."""
        parts = (part if part is None else part.encode("utf-8") for part in (self._base, digest, tenant))
        # Lengths in front: no two triples give the same bytes, and None is not an empty name.
        seed = b"".join(b"-;" if part is None else b"%d:%b;" % (len(part), part) for part in parts)
        key, keys = hashlib.sha256(seed).digest(), []
        for i in range(blocks):
            tokens = array("q", prompt[i * BLOCK : (i + 1) * BLOCK])
            key = hashlib.sha256(key + tokens.tobytes()).digest()
            keys.append(key)
        return keys
