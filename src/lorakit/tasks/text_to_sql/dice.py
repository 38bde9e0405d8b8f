"""Random draws that come out the same in every process and Python version."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """A seeded source of draws.

    Python promises one thing about reproducibility across its versions: the sequence of
        `random.Random.random()` for a given seed. Every draw here is made from that sequence alone, and the
        seed is a digest, never the built-in `hash`.

    Args:
        seed: what names this source, as any printable values: `Dice("train", 0)`.
    """

    def __init__(self, *seed: object) -> None:
        digest = hashlib.sha256("/".join(map(str, seed)).encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:8], "big"))

    def below(self, count: int) -> int:
        """An integer from 0 to `count - 1`."""
        return int(self._random.random() * count)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self._random.random() < probability

    def choice(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        return options[self.below(len(options))]

    def weighted(self, options: Sequence[tuple[T, int]]) -> T:
        """One of the `(option, weight)` pairs' options, as likely as its weight."""
        mark = self.below(sum(weight for _, weight in options))
        for option, weight in options:
            mark -= weight
            if mark < 0:
                return option
        raise AssertionError("the mark lies below the sum of the weights")

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """All the options in a random order."""
        pool = list(options)
        for last in range(len(pool) - 1, 0, -1):
            other = self.below(last + 1)
            pool[last], pool[other] = pool[other], pool[last]
        return pool

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options in a random order."""
        return self.shuffled(options)[:count]
