"""What is in memory: lending it, making room, freeing it; the one lock of a store, and the thread that keeps time."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lorakit.errors import AdapterCapacityError, ServeError
from lorakit.serve.contents import Content
from lorakit.serve.rooms import Room, Rooms, Tenant, Ticket
from lorakit.serve.versions import AdapterVersion, Lease

_log = logging.getLogger(__name__)
_NEARLY, _LONGEST_FREEING = 0.02, 5.0  # seconds
Clock = Callable[[], float]
Hook = Callable[[AdapterVersion], object]


class Memory:
    """Contents in memory and their room.

    Every method but `locked` and `close` is called with the lock held. Nothing that can wait or that is not ours
    (hooks, futures) runs under it: `after` puts such calls off until it is free.

    Attributes:
        contents: By digest.
        rooms: The budget.
        clock: Seconds.
        hits, misses, evictions: Counters.
    """

    def __init__(self, rooms: Rooms, capacity_wait: float, on_free: Hook | None, clock: Clock) -> None:
        self.contents: dict[str, Content] = {}
        self.rooms, self.clock = rooms, clock
        self.hits = self.misses = self.evictions = 0
        self._wait, self._on_free = capacity_wait, on_free
        self._changed = threading.Condition(threading.Lock())
        self._after: list[Callable[[], None]] = []
        self._going: list[tuple[Content, AdapterVersion, bool]] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order, self._uses = itertools.count(), itertools.count(1)
        self._closed = False
        self._keeper = threading.Thread(target=self._keep, name="adapter-keeper", daemon=True)
        self._keeper.start()

    # ---- the lock
    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock; afterwards, call what was put off."""
        after: list[Callable[[], None]] = []
        try:
            with self._changed:
                try:
                    yield
                finally:
                    after, self._after = self._after, after
        finally:
            for call in after:
                call()

    def after(self, call: Callable[[], None]) -> None:
        """Call something as soon as the lock is free."""
        self._after.append(call)

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call something under the lock at a time; it finds out itself whether it still matters."""
        heapq.heappush(self._timers, (when, next(self._order), call))
        self._changed.notify_all()

    # ---- lending
    def lend(self, content: Content, name: str, holder: str | None) -> Lease:
        """A lease on what is ready."""
        assert content.version is not None
        lease = Lease(content.version, self._give_back, name, holder)
        content.leases[lease.serial] = lease
        self.touch(content)
        content.uses += 1
        return lease

    def touch(self, content: Content) -> None:
        """Count as used just now."""
        content.last_used, content.used_at = next(self._uses), self.clock()

    def _give_back(self, lease: Lease) -> None:
        with self.locked():
            content = self.contents.get(lease.version.digest)
            if content is None or content.leases.pop(lease.serial, None) is None:
                return  # given back before
            if not content.leases:
                self.free_if_unnamed(content)
                self.settle()

    # ---- freeing
    def free_if_unnamed(self, content: Content) -> None:
        """Free what no name leads to, once nobody holds it; a mix has no name, and stays while its parts have."""
        if content.routes or content.leases or content.flight is not None or content.going:
            return
        parts = [self.contents.get(digest) for digest in content.parts]
        if content.version is None:
            self.contents.pop(content.digest, None)
        elif not parts or not all(part is not None and part.routes for part in parts):
            self.rooms.freeing += content.room
            self._send_off(content, whole=True)

    def _send_off(self, content: Content, *, whole: bool) -> None:
        assert content.version is not None
        content.going = "evict" if whole else "demote"
        self._going.append((content, content.version, whole))
        self._changed.notify_all()

    def _gone(self, content: Content, whole: bool) -> None:
        prepared = content.bytes if content.prepared else 0
        self.rooms.give(Room(content.bytes if whole else 0, prepared), freed=True)
        content.prepared, content.going = False, None
        if whole:
            content.version = None
            if not content.routes:
                self.contents.pop(content.digest, None)
        pending, content.pending = content.pending, []
        for waiter in pending:
            self.after(waiter.retry)
        if not whole:
            self.free_if_unnamed(content)
        self.settle()

    # ---- waiting for room
    def wait_for_room(
        self, need: Room, expected: str, go: Callable[[], None], fail: Callable[[ServeError], None]
    ) -> Ticket:
        """Set room aside now or later; ``go`` or ``fail`` is called once, under the lock."""
        now = self.clock()
        ticket = Ticket(need, now + self.rooms.patience, now + self._wait, go, fail, expected)
        self.rooms.queue.append(ticket)
        self.at(ticket.aged_at, self.settle)
        self.at(ticket.deadline, lambda: self._expire(ticket))
        self.settle()
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Wait no longer; neither ``go`` nor ``fail`` is called."""
        if ticket in self.rooms.queue:
            self.rooms.queue.remove(ticket)
            self.settle()

    def settle(self) -> None:
        """Serve the queue as far as there is room, and make room as far as something can go."""
        decision = self.rooms.decide(self._tenants(), self.clock())
        for content in self.contents.values():
            content.held_back = content in decision.hold_back
        for content in decision.evict:
            self.evictions += 1
            self._send_off(content, whole=True)
        for content in decision.demote:
            self._send_off(content, whole=False)
        for ticket in decision.granted:
            ticket.go()

    def _tenants(self) -> Iterator[Tenant[Content]]:
        for content in self.contents.values():
            if content.version is not None and content.going is None and content.flight is None:
                idle, free = not content.leases, not content.pins
                yield Tenant(content, content.room, idle, free, content.last_used)

    def _expire(self, ticket: Ticket) -> None:
        if ticket not in self.rooms.queue:
            return
        soon = self.rooms.budget - self.rooms.used + self.rooms.freeing
        if ticket.need.within(soon) and self.clock() < ticket.deadline + _LONGEST_FREEING:
            self.at(self.clock() + _NEARLY, lambda: self._expire(ticket))  # it is just being freed
            return
        self.rooms.queue.remove(ticket)
        pinned = sum(content.bytes for content in self.contents.values() if content.pins and content.version)
        ticket.fail(
            AdapterCapacityError(
                f"There is no room for {ticket.expected}: {self.rooms.used.host} of {self.rooms.budget.host} bytes are "
                f"taken ({pinned} pinned, the rest in use) and none came free in {self._wait:g} s. Try again, unpin an "
                "adapter, or give the store more memory.",
                retry_after=max(1.0, self._wait),
            )
        )
        self.settle()

    # ---- the keeper
    def _keep(self) -> None:
        while True:
            with self._changed:
                while not self._going and not self._closed:
                    wait = self._timers[0][0] - self.clock() if self._timers else None
                    if wait is not None and wait <= 0:
                        break
                    self._changed.wait(wait)
                if self._closed and not self._going:
                    return
                going, self._going = self._going, []
            with self.locked():
                while self._timers and self._timers[0][0] <= self.clock():
                    heapq.heappop(self._timers)[2]()
            for content, version, whole in going:
                if content.prepared:
                    self.forget(version)
                with self.locked():
                    self._gone(content, whole)

    def forget(self, version: AdapterVersion) -> None:
        """Tell the hook that a version leaves. Called without the lock."""
        if self._on_free is not None:
            try:
                self._on_free(version)
            except Exception:
                _log.exception("freeing %r failed", version)

    def close(self, timeout: float) -> None:
        """Stop keeping time, after what is on its way has been freed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._keeper.join(timeout)
