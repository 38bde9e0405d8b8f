"""The arena hands out ranges that never overlap, and gets all of its room back."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from lorakit.errors import ConfigError
from lorakit.serve.kv import BLOCK, KVArena, Slab, rounded


class Allocations(RuleBasedStateMachine):
    slabs = Bundle("slabs")

    def __init__(self) -> None:
        super().__init__()
        self.arena = KVArena(1, 1, 2, 20 * BLOCK)
        self.live: list[Slab] = []

    @rule(target=slabs, tokens=st.integers(1, 6 * BLOCK))
    def reserve(self, tokens: int) -> Slab | None:
        used = sorted((s.start, s.start + s.size) for s in self.live)
        edges = [0, *(x for pair in used for x in pair), self.arena.capacity]
        largest = max(b - a for a, b in zip(edges[::2], edges[1::2], strict=True))
        slab = self.arena.reserve(tokens)
        assert (slab is None) == (largest < rounded(tokens))
        if slab is not None:
            assert slab.size == rounded(tokens) >= tokens
            assert slab.start % BLOCK == 0
            self.live.append(slab)
        return slab

    @rule(slab=consumes(slabs), again=st.booleans())
    def free(self, slab: Slab | None, again: bool) -> None:
        if slab is not None:
            slab.free()
            self.live.remove(slab)
            if again:
                slab.free()

    @invariant()
    def nothing_overlaps_and_all_is_counted(self) -> None:
        spans = sorted((s.start, s.start + s.size) for s in self.live)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert all(a >= 0 and b <= self.arena.capacity for a, b in spans)
        assert self.arena.used == sum(b - a for a, b in spans)

    def teardown(self) -> None:
        for slab in self.live:
            slab.free()
        whole = self.arena.reserve(self.arena.capacity)
        assert whole is not None, "the holes were not put together again"


TestAllocations = Allocations.TestCase
TestAllocations.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_slab_is_its_own_part_of_the_arena() -> None:
    arena = KVArena(2, 3, 4, 3 * BLOCK)
    first, second = arena.reserve(10), arena.reserve(70)
    assert first is not None
    assert second is None or second.start == BLOCK
    first.keys(1, 10).fill_(7.0)
    assert arena.keys[1, :, :10].eq(7).all()
    assert first.keys(1, 10).shape == (3, 10, 4)


def test_what_was_read_can_be_written_elsewhere() -> None:
    arena = KVArena(2, 3, 4, 6 * BLOCK)
    one, two, three = (arena.reserve(2 * BLOCK) for _ in range(3))
    assert one is not None
    assert two is not None
    assert three is not None
    for slab in (one, two, three):
        for layer in range(2):
            slab.keys(layer, 2 * BLOCK).normal_()
            slab.values(layer, 2 * BLOCK).normal_()
    two.write(5, one.read(3, 9))
    assert torch.equal(two.read(5, 11), one.read(3, 9))
    three.copy_from(one, 20)
    assert torch.equal(three.read(0, 20), one.read(0, 20))
    assert not torch.equal(three.read(BLOCK, 2 * BLOCK), one.read(BLOCK, 2 * BLOCK))


def test_what_can_never_fit_is_refused_instead_of_waited_for() -> None:
    arena = KVArena(1, 1, 1, 2 * BLOCK)
    with pytest.raises(ConfigError, match="whole cache holds 128"):
        arena.reserve(2 * BLOCK + 1)
    with pytest.raises(ConfigError):
        arena.reserve(0)
    with pytest.raises(ConfigError, match="least is 64"):
        KVArena(1, 1, 1, 63)


def test_bytes_are_those_of_keys_and_values() -> None:
    arena = KVArena(3, 2, 8, 100, torch.float16)
    assert arena.capacity == 64
    assert arena.bytes_per_token == 2 * 3 * 2 * 8 * 2
    assert arena.nbytes == 64 * arena.bytes_per_token
