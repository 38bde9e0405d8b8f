"""Loads under way: looked up, given room, read, prepared, told to all who wait; one at a time for each source."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

from lorakit.errors import (
    AdapterIncompatibleError,
    AdapterLoadTimeoutError,
    InternalServeError,
    LorakitError,
    MemoryExhaustedError,
    ModelNotFoundError,
    ServeError,
)
from lorakit.serve.contents import Content, Source
from lorakit.serve.flight import Flight
from lorakit.serve.memory import Hook, Memory
from lorakit.serve.rooms import Room
from lorakit.serve.sources import Adapter, Files, Identity
from lorakit.serve.threads import LoadingThreads
from lorakit.serve.versions import AdapterVersion, make_version
from lorakit.serve.waiters import Waiter

_log = logging.getLogger(__name__)
_MOST_REMEMBERED = 4096


class Flights:
    """All loads of a store.

    Attributes:
        loads: How many contents were read.
        failures: How many loads failed.
        under_way: Those that have not ended.
    """

    def __init__(
        self,
        memory: Memory,
        threads: LoadingThreads,
        prepare: Hook | None,
        timeout: float,
        remember: float,
    ) -> None:
        self.loads = self.failures = 0
        self.under_way: set[Flight] = set()
        self._memory, self._threads, self._prepare = memory, threads, prepare
        self._timeout, self._remember = timeout, remember
        self._by_source: dict[tuple[Path, Identity], Flight] = {}
        self._read_from: dict[tuple[Path, Identity], str] = {}
        self._failed: dict[tuple[Path, Identity | None], tuple[float, ServeError]] = {}

    # ---- under the lock
    def start(self, flight: Flight) -> None:
        """Begin: look the files up, or make the mix."""
        self.under_way.add(flight)
        if flight.path is not None and not flight.explicit:
            error = self._recent(flight.path, None)
            if error is not None:
                self._fail(flight, error)
                return
        self._next(flight, self._look_up if flight.look_up is not None else self._read)

    def prepare(self, content: Content, waiter: Waiter) -> None:
        """Begin with what is on the host already."""
        version = content.version
        assert version is not None
        known = Adapter(version.state, version.template)
        flight = Flight(version.name, version.source, read=lambda flight: known, waiters=[waiter])
        flight.version, flight.content, content.flight = version, content, flight
        self.under_way.add(flight)
        self._ask_for_room(flight, Room(0, content.bytes), self._make_ready)

    def cancel(self, error: ServeError) -> None:
        """End all loads."""
        for flight in list(self.under_way):
            self._fail(flight, error)
        for ticket in self._memory.rooms.queue:
            ticket.fail(error)
        self._memory.rooms.queue.clear()
        for content in self._memory.contents.values():
            pending, content.pending = content.pending, []
            for waiter in pending:
                waiter.failed(error)

    def _recent(self, path: Path, identity: Identity | None) -> ServeError | None:
        """The error of a moment ago, if nothing has changed since."""
        until, error = self._failed.get((path, identity), (0.0, None))
        if error is not None and self._memory.clock() >= until:
            del self._failed[path, identity]
            return None
        return error

    def _ask_for_room(self, flight: Flight, need: Room, step: Callable[[Flight], None]) -> None:
        def go() -> None:
            flight.room += need
            flight.ticket = None
            self._next(flight, step)

        def fail(error: ServeError) -> None:
            flight.ticket = None
            self._fail(flight, error)

        if not (flight.room + need).within(self._memory.rooms.budget):
            self._fail(
                flight,
                AdapterIncompatibleError(
                    f"{flight.name!r} needs {max(need)} bytes of memory, more than there are for all adapters together."
                ),
            )
            return
        ticket = self._memory.wait_for_room(need, f"{flight.name!r} ({max(need)} bytes)", go, fail)
        if ticket in self._memory.rooms.queue:
            flight.ticket = ticket

    def _next(self, flight: Flight, step: Callable[[Flight], None]) -> None:
        flight.step += 1
        number = flight.step
        flight.running = True
        flight.job = self._threads.submit(functools.partial(self._run, flight, step, number))
        self._memory.at(self._memory.clock() + self._timeout, lambda: self._late(flight, number))

    def _late(self, flight: Flight, number: int) -> None:
        if flight.over or flight.step != number or not flight.running:
            return
        assert flight.job is not None
        flight.running = self._threads.give_up(flight.job)
        self._fail(
            flight,
            AdapterLoadTimeoutError(
                f"Loading {flight.name!r} took longer than {self._timeout:g} s. Other adapters are not affected.",
                retry_after=self._remember,
            ),
        )

    def _end(self, flight: Flight) -> list[Waiter]:
        flight.over = True
        self.under_way.discard(flight)
        if flight.files is not None:
            key = (flight.files.path, flight.files.identity)
            if self._by_source.get(key) is flight:
                del self._by_source[key]
        content = flight.content
        if content is not None and content.flight is flight:
            content.flight = None
        if flight.at_end is not None:
            self._memory.after(flight.at_end)
        waiters, flight.waiters = flight.waiters, []
        return waiters

    def _fail(self, flight: Flight, error: ServeError) -> None:
        if flight.over:
            return
        waiters = self._end(flight)
        self.failures += not isinstance(error, ModelNotFoundError)
        if flight.ticket is not None:
            self._memory.withdraw(flight.ticket)
        if not flight.running:
            self._give_back(flight)
        late = isinstance(error, AdapterLoadTimeoutError)
        if flight.path is not None and (late or error.status < 500):  # the file's own fault
            if len(self._failed) >= _MOST_REMEMBERED:
                self._failed.clear()
            until = self._memory.clock() + self._remember
            if late:
                self._failed[flight.path, None] = (until, error)
            elif flight.files is not None:
                self._failed[flight.files.path, flight.files.identity] = (until, error)
        for waiter in waiters:
            waiter.failed(error)
        if flight.content is not None:
            self._memory.free_if_unnamed(flight.content)

    def _give_back(self, flight: Flight) -> None:
        room, flight.room = flight.room, Room()
        self._memory.rooms.give(room)
        self._memory.settle()

    def _hand_over(self, flight: Flight, content: Content) -> None:
        """End a load whose content is in memory or on its way there; those who wait go on with that."""
        self._give_back(flight)
        for waiter in self._end(flight):
            if content.ready:
                waiter.ready(content)
            elif content.going is not None:
                content.pending.append(waiter)
            elif content.flight is not None:
                content.flight.waiters.append(waiter)
            else:
                self.prepare(content, waiter)

    def _known(self, files: Files) -> Content | None:
        """The content of files that were read before, if it is in memory still."""
        digest = self._read_from.get((files.path, files.identity))
        content = None if digest is None else self._memory.contents.get(digest)
        if content is None:
            self._read_from.pop((files.path, files.identity), None)
        return content if content is not None and content.version is not None else None

    def _remember_source(self, files: Files, content: Content) -> None:
        if len(self._read_from) >= _MOST_REMEMBERED:
            inside = {c.digest for c in self._memory.contents.values() if c.version is not None}
            self._read_from = {key: digest for key, digest in self._read_from.items() if digest in inside}
        self._read_from[files.path, files.identity] = content.digest

    # ---- on a loading thread
    def _run(self, flight: Flight, step: Callable[[Flight], None], number: int) -> None:
        error: ServeError | None = None
        try:
            if not flight.over:
                step(flight)
        except ServeError as problem:
            error = problem.again()  # without a traceback, whose frames would keep tensors alive
        except LorakitError as problem:
            error = AdapterIncompatibleError(f"{flight.name!r} cannot be served: {problem}")
        except MemoryError:
            error = MemoryExhaustedError(f"There is not enough memory to load {flight.name!r}.")
        except Exception as problem:
            _log.exception("loading %s failed", flight.name)
            error = InternalServeError(f"Loading {flight.name!r} failed: {type(problem).__name__}.")
        with self._memory.locked():
            if flight.step != number:
                return  # the next step has begun
            flight.running = False
            if flight.over:
                self._give_back(flight)
            elif error is not None:
                self._fail(flight, error)

    def _look_up(self, flight: Flight) -> None:
        assert flight.look_up is not None
        assert flight.check is not None
        files = flight.look_up()
        with self._memory.locked():
            if flight.over:
                return
            flight.files = files
            error = None if flight.explicit else self._recent(files.path, files.identity)
            if error is not None:
                flight.running = False
                self._fail(flight, error)
                return
            other = self._by_source.get((files.path, files.identity))
            if other is not None:
                flight.running = False
                other.waiters += self._end(flight)
                return
            known = self._known(files)
            if known is not None:
                flight.running = False
                self._hand_over(flight, known)
                return
            self._by_source[files.path, files.identity] = flight
        size = flight.check(files)
        with self._memory.locked():
            if not flight.over:
                flight.running = False
                self._ask_for_room(flight, Room(size, 0), self._read)

    def _read(self, flight: Flight) -> None:
        found = flight.read(flight)
        version = make_version(found.state, flight.name, 0, flight.source, found.template)
        if flight.digest is not None:
            version.digest = flight.digest
        with self._memory.locked():
            if flight.over:
                return
            flight.running = False
            self.loads += 1
            content = self._memory.contents.get(version.digest)
            if content is None:
                content = self._memory.contents[version.digest] = Content(version.digest, parts=flight.parts)
            content.loads += 1
            if flight.files is not None:
                content.sources.pop(flight.files.path, None)
                content.sources[flight.files.path] = Source(flight.within, flight.files.identity)
                self._remember_source(flight.files, content)
            if content.version is not None or content.flight not in (None, flight):
                self._hand_over(flight, content)
                return
            self._fill(flight, content, version)

    def _fill(self, flight: Flight, content: Content, version: AdapterVersion) -> None:
        old = flight.content
        if old is not None and old is not content:  # its file was changed: it is not what it was loaded for
            old.flight = None
            self._memory.free_if_unnamed(old)
        flight.content, content.flight = content, flight
        spec = version.state.spec
        content.bytes, content.rank, content.base = version.bytes, version.rank, spec.base
        content.targets = len(spec.methods)
        content.methods = tuple(sorted({method.name for method in spec.methods.values()}))
        need = Room(version.bytes, version.bytes)
        if content.name:
            version.name, version.version = content.name, content.number
        flight.version = version
        surplus = Room(*(max(0, n) for n in flight.room - need))
        self._memory.rooms.give(surplus)
        flight.room -= surplus
        if need.within(flight.room):
            self._next(flight, self._make_ready)
            self._memory.settle()
        else:
            self._ask_for_room(flight, need - flight.room, self._make_ready)

    def _make_ready(self, flight: Flight) -> None:
        version = flight.version
        assert version is not None
        if self._prepare is not None:
            self._prepare(version)
        with self._memory.locked():
            content = flight.content
            if not flight.over:
                assert content is not None
                flight.running = False
                content.version, content.prepared = version, True
                flight.room = Room()  # it is the content's now
                self._memory.touch(content)
                for waiter in self._end(flight):
                    waiter.ready(content)
                self._memory.free_if_unnamed(content)
                self._memory.settle()
                return
        self._memory.forget(version)  # nobody waited for it to the end
