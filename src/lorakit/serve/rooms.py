"""Room in memory: a budget of bytes, what to evict, and who is next when there is none. Pure rules, no threads.

Whoever calls holds the store's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from lorakit.errors import ServeError


class Room(NamedTuple):
    """Bytes on the host, and bytes among those that are prepared to run."""

    host: int = 0
    prepared: int = 0

    def __add__(self, other: Room) -> Room:  # type: ignore[override]
        return Room(self.host + other.host, self.prepared + other.prepared)

    def __sub__(self, other: Room) -> Room:
        return Room(self.host - other.host, self.prepared - other.prepared)

    def within(self, other: Room) -> bool:
        """Whether it fits in both respects."""
        return self.host <= other.host and self.prepared <= other.prepared


@dataclass(eq=False)
class Ticket:
    """One who waits for room.

    Attributes:
        need: What is asked for.
        aged_at: When it has waited for so long that nobody passes it any more.
        deadline: When it ends without success.
        go: Called when the room has been set aside.
        fail: Called with the reason when it could not be.
        expected: What it waits for, for the error's text.
    """

    need: Room
    aged_at: float
    deadline: float
    go: Callable[[], None]
    fail: Callable[[ServeError], None]
    expected: str = ""


T = TypeVar("T")


@dataclass(frozen=True, slots=True)  # a generic NamedTuple needs Python 3.11
class Tenant(Generic[T]):
    """Something in memory, as the rules see it."""

    content: T
    room: Room
    idle: bool
    evictable: bool
    last_used: int


@dataclass
class Decision(Generic[T]):
    """What is to be done now.

    Attributes:
        granted: Their room has been set aside.
        evict: Leave memory altogether.
        demote: Stay on the host and are no longer prepared.
        hold_back: In use, and to be lent to nobody else until the oldest ticket has been served.
    """

    granted: list[Ticket] = field(default_factory=list)
    evict: list[T] = field(default_factory=list)
    demote: list[T] = field(default_factory=list)
    hold_back: set[T] = field(default_factory=set)


class Rooms:
    """The budget and the queue for it.

    Served in order of arrival. One who needs little may pass one who needs much, but only until the oldest has waited
    for ``patience`` seconds: then nobody passes, and what is in use is lent to nobody else, so that a few busy adapters
    cannot keep another one out for good.

    Attributes:
        budget: The most there may be.
        used: In memory, set aside for a load, or being freed.
        freeing: The part of ``used`` that is being freed.
        queue: Who waits, in order.
    """

    def __init__(self, budget: Room, patience: float) -> None:
        self.budget, self.patience = budget, patience
        self.used, self.freeing = Room(), Room()
        self.queue: list[Ticket] = []

    def take(self, room: Room) -> None:
        """Count room that is in use from now on, whether or not there is any."""
        self.used += room

    def give(self, room: Room, *, freed: bool = False) -> None:
        """Count room that is free from now on; ``freed`` where `freeing` had been told before."""
        self.used -= room
        if freed:
            self.freeing -= room
        assert min(*self.used, *self.freeing) >= 0, (self.used, self.freeing)

    def decide(self, tenants: Iterable[Tenant[T]], now: float) -> Decision[T]:
        """Go through the queue once. What is granted leaves it and counts as used; what is to go counts as freeing."""
        decision: Decision[T] = Decision()
        if not self.queue:
            return decision
        may_go = sorted((t for t in tenants if t.evictable), key=lambda t: t.last_used)
        idle, busy = [t for t in may_go if t.idle], [t for t in may_go if not t.idle]
        promised = Room()
        for place, ticket in enumerate(list(self.queue)):
            soon = self.budget - self.used + self.freeing - promised
            if ticket.need.within(soon):
                if ticket.need.within(self.budget - self.used):
                    self.queue.remove(ticket)
                    self.take(ticket.need)
                    decision.granted.append(ticket)
                else:
                    promised += ticket.need
                continue
            chosen = _enough(idle, ticket.need - soon)
            if chosen is not None:
                for tenant, whole in chosen:
                    idle.remove(tenant)
                    (decision.evict if whole else decision.demote).append(tenant.content)
                    self.freeing += tenant.room if whole else Room(0, tenant.room.prepared)
                promised += ticket.need
            elif place == 0 and now >= ticket.aged_at:
                decision.hold_back = {t.content for t in (*idle, *_for_aged(busy, idle, ticket.need - soon))}
                break
        return decision


def _enough(idle: list[Tenant[T]], lacking: Room) -> list[tuple[Tenant[T], bool]] | None:
    """The longest unused that make up for what is lacking, each with whether it goes altogether; None if all do not."""
    chosen: list[tuple[Tenant[T], bool]] = []
    for tenant in idle:
        if lacking.host <= 0 and lacking.prepared <= 0:
            break
        if lacking.host > 0:
            chosen.append((tenant, True))
            lacking -= tenant.room
        elif tenant.room.prepared:
            chosen.append((tenant, False))
            lacking -= Room(0, tenant.room.prepared)
    return chosen if lacking.host <= 0 and lacking.prepared <= 0 else None


def _for_aged(busy: list[Tenant[T]], idle: list[Tenant[T]], lacking: Room) -> list[Tenant[T]]:
    """What is in use and would do, beside all that is idle; as little of it as is needed."""
    for tenant in idle:
        lacking -= tenant.room
    held = []
    for tenant in busy:
        if lacking.host <= 0 and lacking.prepared <= 0:
            break
        held.append(tenant)
        lacking -= tenant.room
    return held
