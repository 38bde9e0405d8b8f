"""How a request comes to a lease: what is there is lent, what is on its way is waited for, what is neither is read."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from lorakit.errors import ServeError, ShuttingDownError
from lorakit.io.adapter_directory import CONFIG, WEIGHTS
from lorakit.serve.base_facts import BaseFacts
from lorakit.serve.contents import Content, Names, Source
from lorakit.serve.flight import Flight
from lorakit.serve.flights import Flights
from lorakit.serve.manifest import TrustedKeys
from lorakit.serve.memory import Memory
from lorakit.serve.mixes import by_digest, make_mix
from lorakit.serve.rooms import Room
from lorakit.serve.sources import (
    Adapter,
    Files,
    Limits,
    check_files,
    find_files,
    read_adapter,
    resolve_source,
)
from lorakit.serve.versions import AdapterId, Lease, is_name, mix_digest
from lorakit.serve.waiters import LeaseWaiter, LoadWaiter


class Finder:
    """Brings those who wait together with contents.

    Attributes:
        closed: Whether nothing new is begun.
    """

    def __init__(
        self,
        root: Path | None,
        base: BaseFacts,
        limits: Limits,
        trusted: TrustedKeys | None,
        implicit: bool,
        reserved: Collection[str],
        names: Names,
        memory: Memory,
        flights: Flights,
    ) -> None:
        self.closed = False
        self._root, self._base, self._limits, self._trusted = root, base, limits, trusted
        self._implicit, self._reserved = implicit, reserved
        self._names, self._memory, self._flights = names, memory, flights
        self._discoveries: dict[str, Flight] = {}

    # ---- called without the lock
    def lend(self, waiter: LeaseWaiter) -> None:
        """Lend what a request asks for, as soon as it is there."""
        asked = waiter.asked
        assert asked is not None
        with self._memory.locked():
            if self.closed:
                waiter.failed(ShuttingDownError("The server stops."))
                return
            waiter.epoch, waiter.wanted = self._names.epoch(asked.name), self._names.find(asked)
            if waiter.wanted is not None:
                self._enter(waiter.wanted, waiter)
            elif self.may_lie_in_root(asked):
                self._discover(asked.name, waiter)
            else:
                waiter.failed(self._names.unknown(asked))

    def load(self, name: str, source: str, anywhere: bool, waiter: LoadWaiter) -> None:
        """Read what somebody names by its path."""
        within = None if anywhere else self._root

        def find() -> Files:
            return find_files(resolve_source(source, self._root, anywhere=anywhere), within)

        with self._memory.locked():
            path = (self._root or Path()) / source.replace("\0", "?")
            flight = self._flight(name, path, within, waiter)
            flight.look_up, flight.explicit = find, True
            self._flights.start(flight)

    def mix(self, waiter: LeaseWaiter, asked: Sequence[Future[Lease]], weights: Sequence[float]) -> None:
        """Lend the weighted sum of what is asked for, once all of it is there."""
        left = len(asked)
        counting = threading.Lock()

        def one_more(_: Future[Lease]) -> None:
            nonlocal left
            with counting:
                left -= 1
                if left:
                    return
            self._mix_leases(waiter, asked, weights)

        for future in asked:
            future.add_done_callback(one_more)

    def on_disk(self) -> list[str]:
        """The names of the adapters in the folder, read or not."""
        if not self._implicit or self._root is None:
            return []
        try:
            with os.scandir(self._root) as found:
                names = [entry.name for entry in found if is_name(entry.name) and entry.is_dir()]
        except OSError:
            return []
        return sorted(name for name in names if self._holds_adapter(self._root / name))

    def lies_in_root(self, asked: AdapterId) -> bool:
        """Whether a request for this name would be answered with what lies in the folder."""
        if self._root is None or not self.may_lie_in_root(asked):
            return False
        return self._holds_adapter(self._root / asked.name)

    def may_lie_in_root(self, asked: AdapterId) -> bool:
        """The same without looking there."""
        if not self._implicit or self._root is None or asked.version not in (None, 1):
            return False
        return not any(asked.name in names for names in (self._names, self._names.removed, self._reserved))

    def _holds_adapter(self, folder: Path) -> bool:
        try:
            return any((folder / name).exists() for name in (WEIGHTS, CONFIG))
        except OSError:
            return False

    def _mix_leases(
        self, waiter: LeaseWaiter, asked: Sequence[Future[Lease]], weights: Sequence[float]
    ) -> None:
        leases = [f.result() for f in asked if not f.cancelled() and f.exception() is None]

        def release() -> None:
            for lease in leases:
                lease.release()

        try:
            for future in asked:
                future.result()
            parts = by_digest(leases, weights)
        except ServeError as error:
            release()
            with self._memory.locked():
                waiter.failed(error)
            return
        states = {lease.version.digest: lease.version.state for lease in leases}

        def read(flight: Flight) -> Adapter:
            try:
                return Adapter(make_mix([states[d] for d in parts], list(parts.values()), self._limits))
            finally:
                states.clear()
                release()

        with self._memory.locked():
            ((one, weight), *others) = parts.items()
            digest = one if weight == 1 and not others else mix_digest(parts)
            content = self._memory.contents.get(digest)
            if self.closed:
                waiter.failed(ShuttingDownError("The server stops."))
            elif content is not None:
                self._enter(content, waiter)
            else:
                flight = Flight(waiter.text, "mix", read, waiters=[waiter])
                flight.parts, flight.digest, flight.at_end = tuple(parts), digest, release
                content = Content(digest, parts=flight.parts, name=waiter.text, number=1, flight=flight)
                self._memory.contents[digest] = flight.content = content
                self._flights.start(flight)
                return
        release()

    # ---- called with the lock
    def _enter(self, content: Content, waiter: LeaseWaiter) -> None:
        if content.ready and content.held_back:  # somebody has waited for its room for long
            self._memory.wait_for_room(
                Room(), repr(waiter.text), lambda: self._memory.after(waiter.retry), waiter.failed
            )
        elif content.ready:
            self._memory.hits += 1
            waiter.ready(content)
        else:
            self._memory.misses += 1
            if content.going is not None:
                content.pending.append(waiter)
            elif content.flight is not None:
                content.flight.waiters.append(waiter)
            elif content.version is not None:
                self._flights.prepare(content, waiter)
            else:
                self._read_again(content, waiter)

    def _read_again(self, content: Content, waiter: LeaseWaiter) -> None:
        sources = dict(reversed(content.sources.items()))
        path, newest = next(iter(sources.items()))
        flight = self._flight(content.name, path, newest.within, waiter)
        flight.look_up = lambda: _unchanged(sources)
        flight.content, content.flight = content, flight
        self._flights.start(flight)

    def _discover(self, name: str, waiter: LeaseWaiter) -> None:
        assert self._root is not None
        root, known = self._root, self._discoveries.get(name)
        self._memory.misses += 1
        if known is not None and not known.over:
            known.waiters.append(waiter)
            return

        def find() -> Files:
            if not (root / name).is_dir():
                raise self._names.unknown(AdapterId(name, None), self.on_disk())
            return find_files(resolve_source(name, root, anywhere=False), root)

        def forget() -> None:
            with self._memory.locked():
                if self._discoveries.get(name) is flight:
                    del self._discoveries[name]

        flight = self._flight(name, root / name, root, waiter)
        flight.look_up, flight.at_end = find, forget
        self._discoveries[name] = flight
        self._flights.start(flight)

    def _flight(self, name: str, path: Path, within: Path | None, waiter: LeaseWaiter | LoadWaiter) -> Flight:
        def read(flight: Flight) -> Adapter:
            assert flight.files is not None
            return read_adapter(flight.files, self._base, self._limits, self._trusted)

        flight = Flight(name, str(path), read, path=path, within=within, waiters=[waiter])
        flight.check = lambda files: check_files(files, self._limits)
        return flight


def _unchanged(sources: Mapping[Path, Source]) -> Files:
    """The first place whose files are what they were; else the first that has any."""
    found: Files | None = None
    problem: ServeError | None = None
    for path, source in sources.items():
        try:
            files = find_files(path, source.within)
        except ServeError as error:
            problem = problem or error
            continue
        if files.identity == source.identity:
            return files
        found = found or files
    if found is None:
        assert problem is not None
        raise problem
    return found
