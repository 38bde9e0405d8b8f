"""The adapter store: names, versions, tiers, leases, mixes; many threads at once."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.errors import (
    AdapterCapacityError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    ConfigError,
    InvalidRequestError,
    ModelNotFoundError,
)
from lorakit.serve import finding
from lorakit.serve.store import AdapterStore
from lorakit.serve.versions import AdapterVersion
from tests.serve.store_world import facts, in_memory, make_state, new_store, same, until, write

ONE = 3072


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a", "b", "c")):
        write(tmp_path / name, seed)
    return tmp_path


@pytest.fixture
def store(root: Path) -> Iterator[AdapterStore]:
    with new_store(root) as made:
        yield made


# ---- names and versions
def test_a_folder_becomes_an_adapter_when_it_is_asked_for(store: AdapterStore) -> None:
    assert [(e.name, e.tier, e.digest) for e in store.list()] == [(n, "disk", None) for n in "abc"]
    with store.acquire("b", holder="request 7").result(10) as lease:
        assert (lease.name, lease.holder) == ("b", "request 7")
        assert (lease.version.name, lease.version.version, lease.version.rank) == ("b", 1, 4)
        assert same(lease.version.state, make_state(1))
        entry = store.entry("b")
        assert (entry.tier, entry.in_use, entry.bytes, entry.targets, entry.methods) == (
            "prepared", 1, ONE, 4, ("lora",),
        )  # fmt: skip
    assert store.entry("b@1").in_use == 0
    assert store.entry("a").digest is None
    assert store.stats().misses == 1


def test_replacing_makes_a_version_and_requests_keep_theirs(store: AdapterStore, root: Path) -> None:
    old = store.acquire("a").result(10)
    content = old.version.state.to(torch.float64).to(torch.float32)
    state = write(root / "a", 9)
    assert store.acquire("a").result(10).version is old.version, "a file that changes changes nothing"
    version = store.load("a", "a", if_exists="replace").result(10)
    assert (version.version, same(version.state, state)) == (2, True)
    with store.acquire("a").result(10) as lease, store.acquire("a@2").result(10) as two:
        assert lease.version is two.version is version
    with store.acquire("a@1").result(10) as one:
        assert one.version is old.version
    assert same(old.version.state, content)
    assert store.entry("a").versions == (1, 2)


def test_loading_the_same_again_makes_no_version(store: AdapterStore) -> None:
    first = store.load("x", "a").result(10)
    assert store.load("x", "a", if_exists="replace").result(10) is first
    assert store.load("y", "a").result(10) is first
    assert store.stats().loads == 1, "what was read from an unchanged file is not read twice"
    assert len(in_memory(store)) == 1
    assert store.entry("x").versions == (1,)


def test_going_back_to_an_old_content_is_a_new_version(store: AdapterStore) -> None:
    store.load("x", "a").result(10)
    store.load("x", "b", if_exists="replace").result(10)
    store.load("x", "a", if_exists="replace").result(10)
    entry = store.entry("x")
    assert (entry.version, entry.versions) == (3, (1, 2, 3))
    assert entry.digest == store.entry("x@1").digest != store.entry("x@2").digest


def test_a_number_is_never_given_twice(store: AdapterStore) -> None:
    store.load("x", "a").result(10)
    store.unload("x")
    assert store.load("x", "b").result(10).digest != store.entry("a").digest
    assert store.entry("x").versions == (2,)
    assert isinstance(store.acquire("x@1").exception(10), ModelNotFoundError)


def test_unloading_one_version(store: AdapterStore) -> None:
    store.load("x", "a", pinned=True).result(10)
    store.load("x", "b", if_exists="replace").result(10)
    assert store.entry("x").pinned
    assert not store.entry("x@1").pinned, "the pin belongs to the name and has moved along"
    store.unload("x@2")
    assert store.entry("x").version == 1
    assert store.entry("x").pinned
    store.unload("x@1")
    with pytest.raises(ModelNotFoundError):
        store.entry("x")
    until(lambda: store.stats().bytes == 0)


def test_a_request_does_not_bring_back_what_was_unloaded(store: AdapterStore) -> None:
    store.acquire("a").result(10).release()
    store.unload("a")
    store.unload("b")  # it lies in the folder, and is not to be served
    for name in ("a", "b", "a@1"):
        assert isinstance(store.acquire(name).exception(10), ModelNotFoundError)
    assert [entry.name for entry in store.list()] == ["c"]
    store.load("a", "a").result(10)
    store.acquire("a").result(10).release()


def test_unloading_drains(store: AdapterStore) -> None:
    lease, other = store.acquire("a").result(10), store.acquire("a").result(10)
    report = store.unload("a")
    assert (report.status, report.in_flight, report.abort) == ("draining", 2, ())
    assert report.digests == (lease.version.digest,)
    assert same(lease.version.state, make_state(0))
    lease.release()
    assert store.stats().draining == 1
    other.release()
    until(lambda: store.stats().bytes == 0)


def test_force_names_the_requests_to_end(store: AdapterStore) -> None:
    leases = [store.acquire("a", holder=f"r{i}").result(10) for i in range(3)]
    mixed = store.mix({"a": 0.5, "b": 0.5}, holder="mixed").result(10)
    report = store.unload("a", force=True)
    assert sorted(lease.holder or "" for lease in report.abort) == ["mixed", "r0", "r1", "r2"]
    assert mixed.version.digest in report.digests
    for lease in report.abort:
        lease.release()
    until(lambda: list(in_memory(store)) == [store.entry("b").digest])
    assert all(lease not in leases or lease.version for lease in leases)


def test_an_alias_stays_where_it_was_pointed(store: AdapterStore) -> None:
    first = store.load("x", "a").result(10)
    assert store.alias("live", "x").alias_of == "x@1"
    store.load("x", "b", if_exists="replace").result(10)
    assert store.acquire("live").result(10).version is first
    second = store.entry("x").digest
    assert store.unload("x").digests == (second,)
    assert store.acquire("live").result(10).version is first, "a further name keeps it"
    store.load("y", "c").result(10)
    store.alias("live", "y")
    assert store.entry("live").digest == store.entry("y").digest
    assert isinstance(store.acquire("live@1").exception(10), ModelNotFoundError)


def test_unloading_while_it_loads(root: Path) -> None:
    go = threading.Event()
    with new_store(root, prepare=lambda version: go.wait(10)) as store:
        loading, asking = store.load("x", "a"), store.acquire("b")
        until(lambda: store.stats().loading == 2)
        assert store.unload("x").status == "unloaded"
        assert store.unload("b").status == "unloaded"
        go.set()
        assert isinstance(loading.exception(10), ModelNotFoundError)
        assert isinstance(asking.exception(10), ModelNotFoundError)
        until(lambda: store.stats().bytes == 0)


# ---- tiers
def test_the_longest_unused_goes_first(root: Path) -> None:
    freed: list[str] = []
    with new_store(root, max_bytes=2 * ONE, on_free=lambda v: freed.append(v.name)) as store:
        for name in ("a", "b", "a", "c", "b"):
            store.acquire(name).result(10).release()
        assert freed == ["b", "a"]
        assert store.entry("a").tier == "disk"
        assert store.stats().evictions == 2


def test_what_is_on_the_host_is_prepared_again_without_being_read(root: Path) -> None:
    prepared: list[str] = []
    freed: list[str] = []
    with new_store(
        root,
        max_prepared_bytes=ONE,
        prepare=lambda v: prepared.append(v.name),
        on_free=lambda v: freed.append(v.name),
    ) as store:
        for name in ("a", "b", "a"):
            store.acquire(name).result(10).release()
        assert (prepared, freed) == (["a", "b", "a"], ["a", "b"])
        assert store.stats().loads == 2
        assert {e.name: e.tier for e in store.list()} == {"a": "prepared", "b": "host", "c": "disk"}
        assert (store.stats().bytes, store.stats().prepared_bytes) == (2 * ONE, ONE)


def test_pinned_stays(root: Path) -> None:
    with new_store(root, max_bytes=2 * ONE) as store:
        store.acquire("a").result(10).release()
        store.pin("a")
        for name in ("b", "c", "b"):
            store.acquire(name).result(10).release()
        assert store.entry("a").tier == "prepared"
        store.pin("a", False)
        store.acquire("c").result(10).release()
        assert store.entry("a").tier == "disk"
        store.pin("a")  # reads it
        until(lambda: store.entry("a").tier == "prepared")


def test_prefetching(store: AdapterStore) -> None:
    store.prefetch("a")
    store.prefetch("nothing")
    until(lambda: store.entry("a").tier == "prepared")
    assert store.entry("a").in_use == 0


def test_an_evicted_file_that_was_replaced(root: Path) -> None:
    """A name that follows its folder gets a new version; one that was loaded has to be loaded again."""
    with new_store(root, max_bytes=ONE) as store:
        first = store.acquire("a").result(10)
        first.release()
        store.load("mine", "b").result(10)
        store.acquire("c").result(10).release()
        write(root / "a", 7)
        write(root / "b", 8)
        with store.acquire("a").result(10) as lease:
            assert same(lease.version.state, make_state(7))
            assert store.entry("a").versions == (1, 2)
        assert isinstance(store.acquire("a@1").exception(10), AdapterNotFoundError)
        error = store.acquire("mine").exception(10)
        assert isinstance(error, AdapterNotFoundError)
        assert "if_exists" in str(error)
        assert store.load("mine", "b", if_exists="replace").result(10).version == 2
        assert same(store.acquire("mine").result(10).version.state, make_state(8))


def test_another_copy_serves_as_well(root: Path) -> None:
    write(root / "copy", 0)
    with new_store(root, max_bytes=2 * ONE) as store:
        assert store.load("x", "a").result(10) is store.load("y", "copy").result(10)
        for name in ("b", "c"):
            store.acquire(name).result(10).release()
        assert store.entry("x").tier == "disk"
        write(root / "copy", 5)
        assert same(store.acquire("x").result(10).version.state, make_state(0))


# ---- one load for all
def test_one_load_for_all_who_ask(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, go = finding.read_adapter, threading.Event()

    def slowly(*arguments: object) -> object:
        go.wait(10)
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(finding, "read_adapter", slowly)
    with new_store(root, threads=4) as store:
        asked = [store.acquire("a") for _ in range(50)]
        loading = store.load("same", "a")
        until(lambda: store.stats().loading == 1)
        go.set()
        assert {future.result(10).version for future in asked} == {loading.result(10)}
        assert store.stats().loads == 1


def test_a_cold_adapter_does_not_delay_a_hot_one(root: Path) -> None:
    slow = threading.Event()

    def prepare(version: AdapterVersion) -> None:
        if version.name == "b":
            slow.wait(10)

    with new_store(root, prepare=prepare) as store:
        store.acquire("a").result(10).release()
        cold = store.acquire("b")
        began = time.monotonic()
        for _ in range(100):
            hot = store.acquire("a")
            assert hot.done()
            hot.result().release()
        assert time.monotonic() - began < 1
        slow.set()
        cold.result(10).release()


def test_cancelled_futures_give_their_lease_back(root: Path) -> None:
    go = threading.Event()
    with new_store(root, prepare=lambda version: go.wait(10)) as store:
        future = store.acquire("a")
        assert future.cancel()
        go.set()
        until(lambda: store.stats().loading == 0 and store.entry("a").tier == "prepared")
        until(lambda: store.stats().in_use == 0)


def test_awaiting(store: AdapterStore) -> None:
    async def ask() -> str:
        lease = await asyncio.wrap_future(store.acquire("a"))
        with lease:
            return lease.version.name

    assert asyncio.run(ask()) == "a"


# ---- fairness
def test_a_busy_adapter_cannot_keep_another_out(root: Path) -> None:
    """Requests for ``a`` overlap without end; ``b`` needs its room. Without ageing, ``b`` would starve."""
    with new_store(root, max_bytes=ONE, capacity_wait=20.0, patience=0.1) as store:
        over = threading.Event()
        served = [0]

        def keep_busy() -> None:
            before = store.acquire("a").result(10)
            while not over.is_set():
                after = store.acquire("a").result(30)
                before.release()
                before = after
                served[0] += 1
                time.sleep(0.001)
            before.release()

        with ThreadPoolExecutor(1) as pool:
            busy = pool.submit(keep_busy)
            until(lambda: served[0] > 10)
            asked = store.acquire("b")
            lease = None
            try:
                # The busy thread holds one lease while it asks for the next: it must be let go to make progress.
                until(lambda: store.stats().waiting >= 2)
                over.set()
                for content in list(store._memory.contents.values()):
                    for held in list(content.leases.values()):
                        held.release()
                lease = asked.result(10)
                assert lease.version.name == "b"
            finally:
                over.set()
                if lease is not None:
                    lease.release()
            busy.result(30)


def test_small_ones_pass_only_for_a_while(root: Path) -> None:
    write(root / "big", 5, lk.LoRA(r=12))
    with new_store(root, max_bytes=4 * ONE, capacity_wait=5.0, patience=0.3) as store:
        held = [store.acquire(name).result(10) for name in ("a", "b")]
        big = store.acquire("big")  # needs three of the four
        until(lambda: store.stats().waiting == 1)
        held.append(store.acquire("c").result(10))  # fits beside them, and passes
        time.sleep(0.4)
        again = store.acquire("a")  # in memory, but its room is wanted by who has waited for long
        time.sleep(0.05)
        assert not again.done()
        for lease in held:
            lease.release()
        big.result(10).release()
        again.result(10).release()


# ---- mixes
def test_a_mix_is_the_weighted_sum(store: AdapterStore) -> None:
    with store.mix({"a": 0.5, "b": -2.0}).result(10) as lease:
        assert (lease.name, lease.version.rank) == ("a:0.5+b:-2", 8)
        parts = [make_state(0), make_state(1)]
        for path in parts[0].spec.methods:
            found = lease.version.state
            A, B, s = found.spec.methods[path].factors(found.spec.shapes[path], found.parameters(path))  # type: ignore[attr-defined]
            changes = []
            for part in parts:
                x, y, scale = part.spec.methods[path].factors(part.spec.shapes[path], part.parameters(path))  # type: ignore[attr-defined]
                changes.append(scale * (y @ x))
            torch.testing.assert_close(s * (B @ A), 0.5 * changes[0] - 2.0 * changes[1])
        with store.mix({"b": -2.0, "a": 0.5}).result(10) as again:
            assert again.version is lease.version
    loads = store.stats().loads
    store.mix({"a": 0.5, "b": -2.0}).result(10).release()
    assert store.stats().loads == loads


def test_mixes_that_are_none(store: AdapterStore) -> None:
    with store.mix({"a": 1.0, "b": 0.0}).result(10) as lease, store.acquire("a").result(10) as plain:
        assert lease.version is plain.version
    store.alias("twin", "a")
    with store.mix({"a": 0.5, "twin": 0.5}).result(10) as lease, store.acquire("a").result(10) as plain:
        assert lease.version is plain.version


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ({}, InvalidRequestError),
        ({"a": 0.0}, InvalidRequestError),
        ({"a": float("nan")}, InvalidRequestError),
        ({"a": True}, InvalidRequestError),
        ({"a": "1"}, InvalidRequestError),
        ({f"n{i}": 1.0 for i in range(17)}, InvalidRequestError),
        ({"a": 0.5, "nothing": 0.5}, ModelNotFoundError),
        ({"a": 0.5, "dora": 0.5}, AdapterIncompatibleError),
    ],
)
def test_mixes_that_cannot_be(
    store: AdapterStore, root: Path, weights: dict[str, float], error: type[Exception]
) -> None:
    write(root / "dora", 6, lk.DoRA(lk.LoRA(r=4)))
    assert isinstance(store.mix(weights).exception(10), error)
    assert store.stats().in_use == 0
    until(lambda: store.stats().loading == 0)


def test_a_mix_without_room(root: Path) -> None:
    with new_store(root, max_bytes=3 * ONE, capacity_wait=0.1) as store:
        held = [store.acquire(name).result(10) for name in ("a", "b")]
        assert isinstance(store.mix({"a": 0.5, "b": 0.5}).exception(10), AdapterCapacityError)
        for lease in held:
            lease.release()
        store.mix({"a": 0.5, "b": 0.5}).result(10).release()
        assert store.stats().bytes <= 3 * ONE


# ---- what is stored
@pytest.mark.parametrize(
    "method", [lk.DoRA(lk.LoRA(r=2)), lk.VeRA(r=8), lk.IA3(), lk.LoRA(r=3, scaling="rslora", bias=True)]
)
def test_any_method_is_stored(store: AdapterStore, root: Path, method: object) -> None:
    state = write(root / "other", 6, method)  # type: ignore[arg-type]
    with store.acquire("other").result(10) as lease:
        assert same(lease.version.state, state)
        assert lease.version.bytes == state.nbytes
    assert store.stats().bytes == state.nbytes


def test_files_of_a_half_precision_stay_so(store: AdapterStore, root: Path) -> None:
    lk.save(make_state(3).to(torch.bfloat16), root / "half")
    with store.acquire("half").result(10) as lease:
        assert all(
            t.dtype == torch.bfloat16 and t.is_contiguous() for _, _, t in lease.version.state.all_tensors()
        )
        assert lease.version.bytes == ONE // 2


def test_settings_that_make_no_sense(root: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        new_store(root / "nowhere")
    with pytest.raises(ConfigError, match="positive"):
        new_store(root, max_bytes=0)
    with new_store(None) as store:
        assert store.list() == []
        assert isinstance(store.acquire("a").exception(5), ModelNotFoundError)
        with pytest.raises(ConfigError):
            store.load("x", root / "a", if_exists="perhaps")  # type: ignore[arg-type]
        assert store.load("x", root / "a", anywhere=True).result(10).rank == 4


def test_a_base_without_layers_is_told_by_its_outline(root: Path) -> None:
    with new_store(root, base=dataclasses.replace(facts(), layers={})) as store:
        store.acquire("a").result(10).release()


# ---- many at once
def test_threads_hammering(root: Path) -> None:
    """Readers, loaders, writers and unloaders together: every lease is exact, and the accounts come out even."""
    for seed in range(3, 6):
        write(root / f"s{seed}", seed)
    expected = {store_state.nbytes: None for store_state in [make_state(0)]}
    assert expected == {ONE: None}
    freed: list[AdapterVersion] = []
    problems: list[str] = []
    seeds = {"a": 0, "b": 1, "c": 2, "s3": 3, "s4": 4, "s5": 5}
    states = {name: make_state(seed) for name, seed in seeds.items()}
    with new_store(root, max_bytes=3 * ONE, threads=3, capacity_wait=5.0, on_free=freed.append) as store:
        end = time.monotonic() + 4.0

        def read(number: int) -> int:
            dice, count = random.Random(number), 0
            while time.monotonic() < end:
                name = dice.choice(list(seeds))
                try:
                    lease = store.acquire(name).result(30)
                except (AdapterCapacityError, ModelNotFoundError):
                    continue
                if not same(lease.version.state, states[name]):
                    problems.append(f"{name} is not what was asked for")
                time.sleep(dice.random() / 500)
                if any(version is lease.version for version in freed[-20:]):
                    problems.append(f"{name} was freed while it was lent")
                lease.release()
                count += 1
            return count

        def operate() -> int:
            dice, count = random.Random(99), 0
            while time.monotonic() < end:
                name = dice.choice(["s4", "s5"])
                try:
                    store.unload(name)
                    store.load(name, name, if_exists="replace").result(30)
                    store.mix({"a": 0.5, name: dice.choice([0.25, 0.5])}).result(30).release()
                except (AdapterCapacityError, ModelNotFoundError):
                    continue
                count += 1
            return count

        with ThreadPoolExecutor(7) as pool:
            readers = [pool.submit(read, n) for n in range(6)]
            operated = pool.submit(operate).result(60)
            counts = [reader.result(60) for reader in readers]
        assert not problems, problems[:3]
        assert min(counts) > 5
        assert operated > 0
        until(lambda: store.stats().loading == store.stats().waiting == 0)
        stats = store.stats()
        assert stats.in_use == 0
        assert stats.bytes == sum(in_memory(store).values()) <= 3 * ONE
        assert stats.evictions > 10
        for entry in store.list():
            store.unload(entry.name)
        until(lambda: store.stats().bytes == 0)
        assert not store._memory.contents


@pytest.mark.parametrize("error", [1000, -1000])
def test_an_estimate_that_is_wrong_is_put_right(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """What a file becomes in memory may be less or more than its own size."""
    check = finding.check_files
    monkeypatch.setattr(finding, "check_files", lambda files, limits: check(files, limits) + error)
    with new_store(root, max_bytes=2 * ONE + 1000) as store:
        for name in ("a", "b", "c"):
            store.acquire(name).result(10).release()
        until(lambda: store.stats().bytes == 2 * ONE)
        assert len(in_memory(store)) == 2
