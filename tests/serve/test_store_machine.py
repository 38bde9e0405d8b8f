"""The adapter store against a model of itself: any order of loading, naming, pinning, lending, damaging, replacing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from lorakit.core import AdapterState
from lorakit.errors import (
    AdapterCapacityError,
    AdapterCorruptError,
    AdapterExistsError,
    AdapterNotFoundError,
    ModelNotFoundError,
)
from lorakit.io.adapter_directory import WEIGHTS
from lorakit.serve.versions import AdapterVersion, Lease, content_digest
from tests.serve.store_world import facts, make_state, new_store, same, until, write

NAMES = [f"n{i}" for i in range(4)]
FOLDERS = [f"f{i}" for i in range(4)]
SEEDS = range(6)
STATES = {seed: make_state(seed) for seed in SEEDS}
DIGESTS = {seed: content_digest(state) for seed, state in STATES.items()}
ONE = STATES[0].nbytes
BASE = facts()
RARELY = st.integers(0, 9).map(lambda n: n == 9)


@dataclass
class Held:
    """A lease and what it must stay."""

    lease: Lease
    expected: AdapterState
    digest: str


class StoreMachine(RuleBasedStateMachine):
    """Folders hold adapters; names are given by explicit loads. The budget has room for three adapters."""

    leases = Bundle("leases")
    budget = 3 * ONE
    prepared: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="store-machine-"))
        self.on_disk: dict[str, int | None] = {}  # folder to seed; None when damaged
        self.names: dict[str, list[int]] = {}  # name to the seeds of its versions
        self.counters: dict[str, int] = {}
        self.numbers: dict[str, list[int]] = {}
        self.aliases: dict[str, str] = {}  # alias to digest
        self.untouched: dict[
            str, set[str]
        ] = {}  # digest to the folders it was read from that are as they were
        self.held: list[Held] = []
        self.ready: set[int] = set()
        self.problems: list[str] = []  # of the hooks, whose errors the store keeps to itself
        self.stays: set[str] = set()  # digests that were in memory when they were pinned
        self.fail_next = False
        self.store = new_store(
            self.root,
            base=BASE,
            max_bytes=self.budget,
            max_prepared_bytes=self.prepared,
            implicit=False,
            prepare=self._prepare,
            on_free=self._freed,
            threads=1,  # so that the same steps always come to the same
            capacity_wait=0.02,
            patience=0.005,
        )

    @initialize(seeds=st.lists(st.sampled_from(list(SEEDS)), min_size=4, max_size=4))
    def fill(self, seeds: list[int]) -> None:
        for folder, seed in zip(FOLDERS, seeds, strict=True):
            self.replace_on_disk(folder, seed)
        for name, folder in zip(NAMES[:3], FOLDERS, strict=False):
            self.load(name, folder, pinned=False, replace=False, crash=False)

    # ---- hooks
    def _prepare(self, version: AdapterVersion) -> None:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the device went away")
        if id(version) in self.ready:
            self.problems.append("prepared twice")
        self.ready.add(id(version))
        self.kept = [*getattr(self, "kept", []), version]  # so that an id is never used twice

    def _freed(self, version: AdapterVersion) -> None:
        if id(version) not in self.ready:
            self.problems.append("freed without having been prepared")
        if any(held.lease.version is version for held in self.held):
            self.problems.append("freed while it was lent")
        self.ready.discard(id(version))

    # ---- the disk
    @rule(folder=st.sampled_from(FOLDERS), seed=st.sampled_from(list(SEEDS)))
    def replace_on_disk(self, folder: str, seed: int) -> None:
        write(self.root / folder, seed)
        self._touch(folder)
        self.on_disk[folder] = seed

    @rule(folder=st.sampled_from(FOLDERS), really=RARELY)
    def delete_from_disk(self, folder: str, really: bool) -> None:
        if not really:
            return
        shutil.rmtree(self.root / folder, ignore_errors=True)
        self.on_disk.pop(folder, None)
        self._touch(folder)

    @rule(folder=st.sampled_from(FOLDERS), keep=st.floats(0, 0.99), really=RARELY)
    def damage_on_disk(self, folder: str, keep: float, really: bool) -> None:
        if really and folder in self.on_disk:
            path = self.root / folder / WEIGHTS
            data = path.read_bytes()
            path.write_bytes(data[: int(len(data) * keep)])
            self.on_disk[folder] = None
            self._touch(folder)

    # ---- operators
    @rule(
        name=st.sampled_from(NAMES),
        folder=st.sampled_from(FOLDERS),
        pinned=RARELY,
        replace=st.booleans(),
        crash=RARELY,
    )
    def load(self, name: str, folder: str, pinned: bool, replace: bool, crash: bool) -> None:
        pinned = pinned and len(self._pinned()) < 1
        self.fail_next = crash
        future = self.store.load(name, folder, pinned=pinned, if_exists="replace" if replace else "error")
        error = future.exception(10)
        crashed, self.fail_next = crash and not self.fail_next, False
        taken = name in self.aliases or (name in self.names and not replace)
        seed = self.on_disk.get(folder)
        if taken:
            assert isinstance(error, AdapterExistsError)
        elif folder not in self.on_disk:
            assert isinstance(error, AdapterNotFoundError)
        elif seed is None:
            assert isinstance(error, AdapterCorruptError)
            assert error.status == 400
        elif crashed:
            assert error is not None
            assert error.code == "internal_error"  # type: ignore[attr-defined]
        elif error is not None:
            assert isinstance(error, AdapterCapacityError)
            assert self._cannot_fit(DIGESTS[seed])
        else:
            version = future.result()
            assert version.digest == DIGESTS[seed]
            assert same(version.state, STATES[seed])
            self.untouched.setdefault(version.digest, set()).add(folder)
            self.stays |= {version.digest} if pinned else set()
            if not self.names.get(name) or self.names[name][-1] != seed:
                self.counters[name] = self.counters.get(name, 0) + 1
                self.names.setdefault(name, []).append(seed)
                self.numbers.setdefault(name, []).append(self.counters[name])

    @precondition(lambda self: self.names)
    @rule(new=st.sampled_from(["a0", "a1", *NAMES]), data=st.data())
    def alias(self, new: str, data: st.DataObject) -> None:
        of = data.draw(st.sampled_from(sorted(self.names)))
        place = data.draw(st.integers(0, len(self.names[of]) - 1))
        asked = f"{of}@{self.numbers[of][place]}"
        if new in self.names:
            with pytest.raises(AdapterExistsError):
                self.store.alias(new, asked)
            return
        self.store.alias(new, asked)
        self.aliases[new] = DIGESTS[self.names[of][place]]

    @rule(force=st.booleans(), data=st.data(), anything=RARELY)
    def unload(self, force: bool, data: st.DataObject, anything: bool) -> None:
        known = sorted([*self.names, *self.aliases])
        if not anything and not known:
            return
        name = data.draw(st.sampled_from([*NAMES, "a0"] if anything else known))
        if name in self.aliases:
            report = self.store.unload(name, force)
            gone = {self.aliases.pop(name)}
        elif name in self.names:
            report = self.store.unload(name, force)
            gone = {DIGESTS[seed] for seed in self.names.pop(name)}
            del self.numbers[name]
        else:
            with pytest.raises(ModelNotFoundError):
                self.store.unload(name, force)
            return
        unnamed = gone - self._named()
        for digest in unnamed:
            self.untouched.pop(digest, None)
        assert unnamed <= set(report.digests)
        holders = [held for held in self.held if held.digest in unnamed]
        assert report.in_flight >= len(holders)
        assert (report.status == "draining") == bool(report.in_flight)
        assert len(report.abort) == (report.in_flight if force else 0)
        assert all(
            not lease.version.digest or lease in [h.lease for h in self.held] for lease in report.abort
        )
        assert isinstance(self.store.acquire(name).exception(10), ModelNotFoundError)

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        if name not in self.names:
            return
        if pinned and len(self._pinned()) >= 1:
            return
        entry = self.store.pin(name, pinned)
        assert entry.pinned >= pinned
        if pinned and entry.tier != "disk" and not self._going(entry.digest):
            self.stays.add(entry.digest or "")

    # ---- requests
    @rule(target=leases, data=st.data(), crash=RARELY, anything=RARELY)
    def acquire(self, data: st.DataObject, crash: bool, anything: bool) -> object:
        known = sorted([*self.names, *self.aliases])
        name = data.draw(st.sampled_from([*NAMES, "a0"] if anything or not known else known))
        asked, digest = self._draw(name, data)
        self.fail_next = crash
        future = self.store.acquire(asked, holder="somebody")
        error = future.exception(10)
        crashed, self.fail_next = crash and not self.fail_next, False
        if digest is None:
            assert isinstance(error, ModelNotFoundError)
            return multiple()
        if error is None:
            return self._hold(future.result(), STATES[_seed(digest)], digest)
        if crashed:
            assert error.code == "internal_error"  # type: ignore[attr-defined]
        elif isinstance(error, AdapterCapacityError):
            assert self._cannot_fit(digest)
        else:  # not in memory, and what lies in its folder is no longer that
            assert digest not in self._resident()
            assert error.code in ("adapter_not_found", "adapter_corrupt")  # type: ignore[attr-defined]
            assert not self.untouched.get(digest)
        return multiple()

    @precondition(lambda self: self.names)
    @rule(target=leases, data=st.data())
    def mix(self, data: st.DataObject) -> object:
        names = data.draw(st.lists(st.sampled_from(sorted(self.names)), min_size=1, max_size=2, unique=True))
        weights = {name: data.draw(st.sampled_from([0.5, -1.0, 2.0])) for name in names}
        future = self.store.mix(weights)
        error = future.exception(10)
        if error is not None:
            assert error.code in (  # type: ignore[attr-defined]
                "adapter_capacity", "adapter_not_found", "adapter_corrupt", "internal_error", "invalid_request",
            )  # fmt: skip
            return multiple()
        lease = future.result()
        expected: dict[str, torch.Tensor] = {}
        for name, weight in weights.items():
            digest = self.aliases.get(name) or DIGESTS[self.names[name][-1]]
            for path, change in _changes(STATES[_seed(digest)]).items():
                expected[path] = expected.get(path, 0) + weight * change
        for path, change in _changes(lease.version.state).items():
            torch.testing.assert_close(change, expected[path])
        copy = lease.version.state.to(torch.float64).to(torch.float32)
        return self._hold(lease, copy, lease.version.digest)

    @rule(held=consumes(leases))
    def release(self, held: Held) -> None:
        self.held.remove(held)
        held.lease.release()
        held.lease.release()  # once is enough, twice is no harm

    # ---- what always holds
    def _quiet(self) -> None:
        """Wait until nothing is on its way, or the next step's outcome would depend on who is faster."""
        memory, flights = self.store._memory, self.store._flights
        until(lambda: not any(memory.rooms.freeing) and not memory.rooms.queue and not flights.under_way)

    @invariant()
    def held_content_never_changes(self) -> None:
        self._quiet()
        for held in self.held:
            assert same(held.lease.version.state, held.expected)
            assert id(held.lease.version) in self.ready

    @invariant()
    def hooks_are_called_in_order(self) -> None:
        self._quiet()
        assert not self.problems

    @invariant()
    def pinned_stays(self) -> None:
        self._quiet()
        self.stays &= self._pinned()
        memory = self.store._memory
        assert all(memory.contents[digest].version is not None for digest in self.stays)

    @invariant()
    def bytes_are_exact(self) -> None:
        self._quiet()
        memory = self.store._memory
        with memory.locked():
            inside = [c for c in memory.contents.values() if c.version is not None]
            flights = [flight.room for flight in self.store._flights.under_way]
            host = sum(c.bytes for c in inside) + sum(room.host for room in flights)
            prepared = sum(c.bytes for c in inside if c.prepared) + sum(room.prepared for room in flights)
            assert (host, prepared) == tuple(memory.rooms.used)
            assert all(c.bytes == c.version.state.nbytes for c in inside if c.version)
            assert memory.rooms.used.host <= self.budget
            if self.prepared is not None:
                assert memory.rooms.used.prepared <= self.prepared
            leased = sorted(s for c in memory.contents.values() for s in c.leases)
            assert leased == sorted(held.lease.serial for held in self.held)

    @invariant()
    def names_are_as_told(self) -> None:
        listed = {entry.name: entry for entry in self.store.list()}
        assert set(listed) == set(self.names) | set(self.aliases)
        for name, versions in self.names.items():
            assert listed[name].digest == DIGESTS[versions[-1]]
            assert listed[name].versions == tuple(self.numbers[name])
        for alias, digest in self.aliases.items():
            assert listed[alias].digest == digest

    def teardown(self) -> None:
        for held in self.held:
            held.lease.release()
        self.held.clear()
        for name in [*self.names, *self.aliases]:
            self.store.unload(name)
        try:
            until(lambda: self.store.stats().bytes == 0)
            assert not self.store._memory.contents
            assert not self.ready, "something was prepared and never freed"
        finally:
            self.store.close()
            shutil.rmtree(self.root, ignore_errors=True)

    # ---- the model's own
    def _named(self) -> set[str]:
        return {DIGESTS[seed] for v in self.names.values() for seed in v} | set(self.aliases.values())

    def _resident(self) -> set[str]:
        return {c.digest for c in self.store._memory.contents.values() if c.ready}

    def _going(self, digest: str | None) -> bool:
        return self.store._memory.contents[digest or ""].going is not None

    def _pinned(self) -> set[str]:
        return {c.digest for c in self.store._memory.contents.values() if c.pins}

    def _cannot_fit(self, digest: str) -> bool:
        """Whether what is in use or pinned leaves no room to read it, or to prepare it."""
        kept = {h.digest: h.lease.version.bytes for h in self.held} | dict.fromkeys(self._pinned(), ONE)
        others = sum(size for known, size in kept.items() if known != digest)
        prepared = self.budget if self.prepared is None else self.prepared
        return sum(kept.values()) + ONE > self.budget or others + ONE > prepared

    def _draw(self, name: str, data: st.DataObject) -> tuple[str, str | None]:
        if name in self.aliases:
            return name, self.aliases[name]
        if name not in self.names:
            return name, None
        place = data.draw(st.integers(-1, len(self.names[name]) - 1))
        asked = name if place < 0 else f"{name}@{self.numbers[name][place]}"
        return asked, DIGESTS[self.names[name][place]]

    def _touch(self, folder: str) -> None:
        for folders in self.untouched.values():
            folders.discard(folder)

    def _hold(self, lease: Lease, expected: AdapterState, digest: str) -> Held:
        held = Held(lease, expected, digest)
        self.held.append(held)
        return held


def _seed(digest: str) -> int:
    return next(seed for seed, known in DIGESTS.items() if known == digest)


def _changes(state: AdapterState) -> dict[str, torch.Tensor]:
    found = {}
    for path, method in state.spec.methods.items():
        A, B, scale = method.factors(state.spec.shapes[path], state.parameters(path))  # type: ignore[attr-defined]
        found[path] = scale * (B.double() @ A.double())
    return found


class TieredMachine(StoreMachine):
    """The same with room for only two that are prepared at a time."""

    prepared = 2 * ONE


def _case(machine: type[StoreMachine], examples: int) -> Callable[[], None]:
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestStoreMachine = _case(StoreMachine, 40)
TestTieredMachine = _case(TieredMachine, 40)
