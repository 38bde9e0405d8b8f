"""Cached beginnings of prompts: found again, and never for another adapter, tenant or base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.serve.kv import BLOCK, KVArena, Slab
from lorakit.serve.prefix import PrefixCache
from tests.serve.tiny_serving import alone, ids, read, request, tiny_decoder, tiny_engine, versions_of

PROMPT = [i % 50 for i in range(3 * BLOCK + 10)]


def filled(arena: KVArena, tokens: int) -> Slab:
    slab = arena.reserve(tokens)
    assert slab is not None
    slab.write(0, torch.randn(2, 1, 1, tokens, 2))
    return slab


@pytest.fixture
def arena() -> KVArena:
    return KVArena(1, 1, 2, 64 * BLOCK)


def test_what_was_kept_is_copied_in(arena: KVArena) -> None:
    cache, slab, other = PrefixCache(1 << 20), filled(arena, len(PROMPT)), filled(arena, len(PROMPT))
    assert cache.fetch(PROMPT, "d", None, other) == 0
    cache.keep(PROMPT, "d", None, slab)
    assert cache.fetch(PROMPT, "d", None, other) == 3 * BLOCK
    assert torch.equal(other.read(0, 3 * BLOCK), slab.read(0, 3 * BLOCK))
    assert not torch.equal(other.read(3 * BLOCK, len(PROMPT)), slab.read(3 * BLOCK, len(PROMPT)))
    assert cache.statistics.hit == 3 * BLOCK
    assert cache.statistics.queried == 2 * len(PROMPT)


def test_only_the_common_beginning_is_found(arena: KVArena) -> None:
    cache, slab = PrefixCache(1 << 20), filled(arena, len(PROMPT))
    cache.keep(PROMPT, None, None, slab)
    for changed, found in ((0, 0), (BLOCK, BLOCK), (2 * BLOCK + 1, 2 * BLOCK)):
        other = [*PROMPT]
        other[changed] = 99
        assert cache.fetch(other, None, None, filled(arena, len(PROMPT))) == found


def test_a_whole_block_at_the_end_is_left_for_its_logits(arena: KVArena) -> None:
    cache, slab = PrefixCache(1 << 20), filled(arena, 2 * BLOCK)
    prompt = PROMPT[: 2 * BLOCK]
    cache.keep(prompt, None, None, slab)
    assert cache.fetch(prompt, None, None, slab) == BLOCK


names = st.one_of(st.none(), st.text(max_size=3), st.sampled_from(["a", "b", "a;b", "1:a;", "-;"]))


@settings(max_examples=200, deadline=None)
@given(st.tuples(st.text(max_size=3), names, names), st.tuples(st.text(max_size=3), names, names))
def test_keys_of_different_owners_differ(one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
    def first(base: str, digest: str | None, tenant: str | None) -> bytes:
        return PrefixCache(0, base)._keys(PROMPT, digest, tenant, 1)[0]

    assert (first(*one) == first(*two)) == (one == two)


def test_the_budget_is_kept_and_the_oldest_leaves_first(arena: KVArena) -> None:
    slab = filled(arena, len(PROMPT))
    block = slab.read(0, BLOCK).nbytes
    cache = PrefixCache(4 * block)
    cache.keep(PROMPT, "old", None, slab)
    cache.keep(PROMPT[: 2 * BLOCK], "new", None, slab)
    assert cache.statistics.bytes == 4 * block
    assert cache.statistics.evicted == 1
    # Its last block left: the first ones are of use without it, not the other way round.
    assert cache.fetch(PROMPT, "old", None, filled(arena, len(PROMPT))) == 2 * BLOCK
    assert cache.fetch(PROMPT, "new", None, filled(arena, len(PROMPT))) == 2 * BLOCK


def test_an_adapter_that_is_forgotten_takes_its_blocks_along(arena: KVArena) -> None:
    cache, slab = PrefixCache(1 << 20), filled(arena, len(PROMPT))
    cache.keep(PROMPT, "a", None, slab)
    cache.keep(PROMPT, "b", "t", slab)
    cache.forget("a")
    assert cache.fetch(PROMPT, "a", None, slab) == 0
    assert cache.fetch(PROMPT, "b", "t", slab) == 3 * BLOCK
    assert cache.statistics.blocks == 3
    cache.forget("b")
    assert cache.statistics.bytes == 0


def test_answers_are_the_same_with_the_cache_and_nobody_gets_another_s_blocks() -> None:
    stock = tiny_decoder("llama")
    versions = versions_of(stock)
    with tiny_engine(tiny_decoder("llama"), prefix_cache_bytes=1 << 22) as engine:
        for _ in range(2):
            for tenant in ("x", "y"):
                for kind in (None, "lora-7", "dora"):
                    version = None if kind is None else versions[kind]
                    stream = engine.submit(request(PROMPT, version, max_tokens=6, tenant=tenant))
                    tokens, finish = read(stream)
                    assert ids(tokens) == alone(stock, version, PROMPT, 6)
                    seen = 0 if _ == 0 else 3 * BLOCK
                    assert finish.usage.cached_tokens == seen
        engine.forget(versions["dora"])
        read(engine.submit(request(PROMPT, None, max_tokens=1)))
        _, finish = read(engine.submit(request(PROMPT, versions["dora"], max_tokens=1, tenant="x")))
        assert finish.usage.cached_tokens == 0
        statistics = engine.state().prefix
        assert statistics is not None
        assert statistics.hit == 6 * 3 * BLOCK
