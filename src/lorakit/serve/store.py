"""The adapter store: names lead to immutable contents, which are read when they are needed and freed when they are not.

A content is lent: a request holds a `Lease` from its admission to its end, and what it holds never changes and never
goes away, whatever happens to names and files meanwhile. See ``docs/guide/adapter-store.md``.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from os import PathLike
from pathlib import Path
from typing import Literal

from lorakit.errors import AdapterExistsError, ConfigError, ServeError, ShuttingDownError
from lorakit.serve.base_facts import BaseFacts
from lorakit.serve.contents import Content, Names, describe
from lorakit.serve.entries import AdapterEntry, StoreStats, UnloadReport
from lorakit.serve.finding import Finder
from lorakit.serve.flights import Flights
from lorakit.serve.manifest import TrustedKeys
from lorakit.serve.memory import Clock, Hook, Memory
from lorakit.serve.mixes import check_parts, mix_name
from lorakit.serve.rooms import Room, Rooms
from lorakit.serve.sources import Limits
from lorakit.serve.threads import LoadingThreads
from lorakit.serve.versions import AdapterId, AdapterVersion, Lease, parse_id, parse_name
from lorakit.serve.waiters import LeaseWaiter, LoadWaiter, name_taken

_UNLIMITED = 1 << 62


class AdapterStore:
    """Adapters of one base model.

    Every method may be called from any thread and from an event loop: none waits for a load. What takes time returns a
    future, whose exceptions are `ServeError`.

    Args:
        root: A folder whose sub-folders are adapters; None for none.
        base: What the adapters are checked against, see `base_facts`.
        max_bytes: The most memory for adapters. Only what is in use or pinned keeps others out.
        max_prepared_bytes: The most of it that is prepared to run at a time; None for all of it.
        implicit: Whether a request may name a sub-folder of ``root`` that nobody has loaded.
        reserved: Names that no adapter may have: those of the base.
        limits: What an adapter may at most be.
        trusted: If given, only adapters signed with one of these keys are served.
        prepare: Called on a loading thread with a version before it is lent; what it raises is the load's error.
        on_free: Called with a version that was prepared and no longer is, on a thread of the store's own. A version
            that is read again is another object, which may be prepared before this one is freed.
        threads: How many adapters are read at a time.
        load_timeout: Seconds for each step of a load (finding, reading, preparing).
        capacity_wait: Seconds to wait for room.
        patience: Seconds after which the first in the queue for room is passed by nobody.
        remember_failures: Seconds during which a file that could not be loaded is not tried again by requests, unless
            it changes.
        clock: Seconds, rising.
    """

    def __init__(
        self,
        root: Path | str | None,
        base: BaseFacts,
        *,
        max_bytes: int = 1 << 30,
        max_prepared_bytes: int | None = None,
        implicit: bool = True,
        reserved: Collection[str] = (),
        limits: Limits | None = None,
        trusted: TrustedKeys | None = None,
        prepare: Hook | None = None,
        on_free: Hook | None = None,
        threads: int = 2,
        load_timeout: float = 30.0,
        capacity_wait: float = 10.0,
        patience: float = 1.0,
        remember_failures: float = 30.0,
        clock: Clock = time.monotonic,
    ) -> None:
        if root is not None and not Path(root).is_dir():
            raise ConfigError(f"There is no folder of adapters at {root}. Make it, or name another one.")
        if max_bytes < 1 or threads < 1:
            raise ConfigError(f"max_bytes and threads must be positive; got {max_bytes} and {threads}.")
        self.root = None if root is None else Path(root)
        self._reserved = frozenset(reserved)
        prepared = _UNLIMITED if max_prepared_bytes is None else max_prepared_bytes
        rooms = Rooms(Room(max_bytes, prepared), patience)
        self._names = Names()
        self._memory = Memory(rooms, capacity_wait, on_free, clock)
        self._threads = LoadingThreads(threads)
        self._flights = Flights(self._memory, self._threads, prepare, load_timeout, remember_failures)
        self._finder = Finder(
            self.root, base, limits or Limits(), trusted, implicit, self._reserved,
            self._names, self._memory, self._flights,
        )  # fmt: skip
        self._loading: Counter[str] = Counter()

    # ---- requests
    def acquire(self, name: str, *, holder: str | None = None) -> Future[Lease]:
        """A lease on ``name`` or ``name@version``, read first if it has to be; release it when the request has ended.

        The future fails with `InvalidAdapterIdError`, `ModelNotFoundError`, what the load failed with,
        `AdapterLoadTimeoutError` or `AdapterCapacityError`. It may be cancelled.
        """
        future: Future[Lease] = Future()
        try:
            waiter = LeaseWaiter(
                self._memory, self._names, future, parse_id(name), str(name), holder, self._finder.lend
            )
            self._finder.lend(waiter)
        except ServeError as error:
            future.set_exception(error)
        return future

    def prefetch(self, name: str) -> None:
        """Have an adapter read that a waiting request will need; errors show when it is acquired."""

        def let_go(future: Future[Lease]) -> None:
            if future.exception() is None:
                future.result().release()

        self.acquire(name).add_done_callback(let_go)

    def mix(self, weights: Mapping[str, float], *, holder: str | None = None) -> Future[Lease]:
        """A lease on the weighted sum of adapters, which is made once and kept while there is room.

        The future fails as that of `acquire`, and with `InvalidRequestError` or `AdapterIncompatibleError` when the
        weights make no sense or an adapter is of a method whose changes cannot be added exactly.
        """
        future: Future[Lease] = Future()
        try:
            parts = check_parts(weights)
            text = mix_name(parts)

            def make(waiter: LeaseWaiter) -> None:
                asked = [self.acquire(part, holder=holder) for part in parts]
                self._finder.mix(waiter, asked, list(parts.values()))

            make(LeaseWaiter(self._memory, self._names, future, None, text, holder, make))
        except ServeError as error:
            future.set_exception(error)
        return future

    # ---- operators
    def load(
        self,
        name: str,
        source: str | PathLike[str],
        *,
        pinned: bool = False,
        if_exists: Literal["error", "replace"] = "error",
        anywhere: bool = False,
    ) -> Future[AdapterVersion]:
        """Read an adapter and give it a name.

        Args:
            name: The name.
            source: A folder or ``.safetensors`` file, relative to ``root``; it must lie in there.
            pinned: Keep it in memory.
            if_exists: ``"replace"`` to make a new version of a name that exists: requests that run keep the old one.
            anywhere: The path may lie outside of ``root``: for paths that do not come from the network.

        Returns:
            The version, when it is ready. Fails with `AdapterExistsError`, `InvalidAdapterIdError`, and all that is
            wrong with the files.
        """
        future: Future[AdapterVersion] = Future()
        if if_exists not in ("error", "replace"):
            raise ConfigError(f"if_exists is 'error' or 'replace'; got {if_exists!r}.")
        replace = if_exists == "replace"
        try:
            name = parse_name(name, param="name")
            with self._memory.locked():
                if self._finder.closed:
                    raise ShuttingDownError("The server stops.")
                if name in self._reserved:
                    raise AdapterExistsError(f"{name!r} is the base model's name.", param="name")
                taken = name in self._names or self._loading[name] > 0
                if name in self._names.aliases or (taken and not replace):
                    raise name_taken(name)
                self._loading[name] += 1
                epoch = self._names.epoch(name)
        except ServeError as error:
            future.set_exception(error)
            return future

        def begin(waiter: LoadWaiter) -> None:
            self._finder.load(name, os.fspath(source), anywhere, waiter)

        def done() -> None:
            self._loading[name] -= 1

        begin(LoadWaiter(self._memory, self._names, future, name, pinned, replace, begin, done, epoch))
        return future

    def unload(self, name: str, force: bool = False) -> UnloadReport:
        """Take a name away at once, and free its memory when the last request that holds it has ended.

        The name, and all ``name@version``, lead nowhere until it is loaded again; a request does not bring it back.
        ``name@version`` takes away that version alone, an alias that alias alone.

        Args:
            name: What to take away.
            force: Report the leases on it, for the caller to end their requests.

        Raises:
            ModelNotFoundError: There is no such name.
        """
        asked = parse_id(name)
        with self._memory.locked():
            if self._names.find(asked) is None and self._withdraw(asked):
                return UnloadReport("unloaded", 0)
            taken = self._names.remove(asked)
            contents = {content.digest: content for content, _ in taken}
            unnamed = {digest for digest, content in contents.items() if not content.routes}
            mixes = [c for c in self._memory.contents.values() if unnamed.intersection(c.parts)]
            leases = [
                lease
                for content in (*contents.values(), *mixes)
                for lease in content.leases.values()
                if content.digest not in contents or content.digest in unnamed or _asked_by(lease, asked)
            ]
            for content in (*contents.values(), *mixes):
                self._memory.free_if_unnamed(content)
            self._memory.settle()
            gone = (*unnamed, *(mix.digest for mix in mixes))
        status: Literal["unloaded", "draining"] = "draining" if leases else "unloaded"
        return UnloadReport(status, len(leases), tuple(leases) if force else (), tuple(sorted(gone)))

    def pin(self, name: str, pinned: bool = True) -> AdapterEntry:
        """Keep what a name leads to in memory (it is read if it is not there), or no longer.

        Raises:
            ModelNotFoundError: There is no such name.
        """
        asked = parse_id(name)
        with self._memory.locked():
            content = self._names.known(asked)
            if pinned:
                content.pins.add(str(asked))
            else:
                content.pins.discard(str(asked))
                self._memory.settle()
            absent = content.version is None
            entry = self._described(asked, content)
        if pinned and absent:
            self.prefetch(name)
        return entry

    def alias(self, new: str, target: str) -> AdapterEntry:
        """Give what ``target`` leads to now another name; an alias that exists is pointed there.

        It stays there when ``target`` gets a new version, or is unloaded.

        Raises:
            AdapterExistsError: ``new`` is the name of an adapter, or the base's.
            ModelNotFoundError: ``target`` leads nowhere.
        """
        name, asked = parse_name(new, param="name"), parse_id(target)
        with self._memory.locked():
            content = self._names.known(asked)
            if name in self._names.lineages or name in self._reserved or self._loading[name]:
                raise name_taken(name)
            before = self._names.point(name, content)
            if before is not None:
                self._memory.free_if_unnamed(before)
            return self._described(AdapterId(name, None), content)

    # ---- looking
    def list(self) -> list[AdapterEntry]:
        """All names, those that a request may have read from ``root`` included, in order."""
        on_disk = self._finder.on_disk()
        with self._memory.locked():
            entries = {entry.name: entry for entry in self._names.entries(self._memory.clock())}
            for name in on_disk:
                if name not in entries and self._finder.may_lie_in_root(AdapterId(name, None)):
                    entries[name] = AdapterEntry(name, source=str(self.root / name) if self.root else None)
        return [entries[name] for name in sorted(entries)]

    def entry(self, name: str) -> AdapterEntry:
        """What there is to know of ``name`` or ``name@version``.

        Raises:
            ModelNotFoundError: There is no such name.
        """
        asked = parse_id(name)
        with self._memory.locked():
            content = self._names.find(asked)
            if content is not None:
                return self._described(asked, content)
            if asked.version is None and self._finder.lies_in_root(asked):
                return AdapterEntry(asked.name, source=str(self.root / asked.name) if self.root else None)
            raise self._names.unknown(asked)

    def stats(self) -> StoreStats:
        """Counters and gauges, all of one moment."""
        memory, flights = self._memory, self._flights
        with memory.locked():
            inside = [content for content in memory.contents.values() if content.version is not None]
            return StoreStats(
                bytes=memory.rooms.used.host,
                max_bytes=memory.rooms.budget.host,
                prepared_bytes=memory.rooms.used.prepared,
                contents=len(inside),
                in_use=sum(len(content.leases) for content in inside),
                loading=len(flights.under_way),
                waiting=len(memory.rooms.queue),
                draining=sum(not content.routes and not content.parts for content in inside),
                hits=memory.hits,
                misses=memory.misses,
                loads=flights.loads,
                failures=flights.failures,
                evictions=memory.evictions,
            )

    def close(self, timeout: float = 5.0) -> None:
        """Refuse what comes, fail what waits, and stop the threads. Leases that are out stay valid."""
        with self._memory.locked():
            self._finder.closed = True
            self._flights.cancel(ShuttingDownError("The server stops."))
        self._threads.close(timeout)
        self._memory.close(timeout)

    def __enter__(self) -> AdapterStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- inside
    def _withdraw(self, asked: AdapterId) -> bool:
        """Take away a name that leads nowhere yet: it is being loaded, or lies in the folder. Whether it does."""
        if asked.version is not None or asked.name in self._names:
            return False
        if not self._loading[asked.name] and not self._finder.lies_in_root(asked):
            return False
        self._names.withdraw(asked.name)
        return True

    def _described(self, asked: AdapterId, content: Content) -> AdapterEntry:
        return describe(asked, content, self._names, self._memory.clock())


def _asked_by(lease: Lease, asked: AdapterId) -> bool:
    return lease.name == str(asked) or (asked.version is None and lease.name.split("@")[0] == asked.name)
