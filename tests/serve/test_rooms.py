"""Who gets room, and what goes for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorakit.serve.rooms import Room, Rooms, Tenant, Ticket


def ticket(host: int, prepared: int = 0, aged_at: float = 1.0) -> Ticket:
    return Ticket(Room(host, prepared), aged_at, 100.0, lambda: None, lambda error: None)


def tenant(name: str, host: int, prepared: int = 0, *, idle: bool = True, last_used: int = 0) -> Tenant[str]:
    return Tenant(name, Room(host, prepared), idle, True, last_used)


def rooms(host: int, used: int, *tickets: Ticket, prepared: int = 100, prepared_used: int = 0) -> Rooms:
    made = Rooms(Room(host, prepared), patience=1.0)
    made.take(Room(used, prepared_used))
    made.queue = list(tickets)
    return made


def test_what_fits_is_granted_at_once() -> None:
    first, second = ticket(4), ticket(6)
    made = rooms(10, 0, first, second)
    assert made.decide([], 0.0).granted == [first, second]
    assert made.used == Room(10)
    assert made.queue == []


def test_the_longest_unused_goes_and_no_more_than_is_needed() -> None:
    made = rooms(10, 9, ticket(3))
    tenants = [tenant(name, 3, last_used=n) for n, name in enumerate(("old", "newer", "newest"))]
    decision = made.decide(tenants, 0.0)
    assert (decision.evict, decision.granted) == (["old"], [])
    assert made.decide(tenants[1:], 0.0).evict == [], "what is being freed is enough"
    made.give(Room(3), freed=True)
    assert len(made.decide(tenants[1:], 0.0).granted) == 1


def test_what_is_being_freed_is_promised_only_once() -> None:
    made = rooms(4, 4, ticket(2), ticket(2))
    tenants = [tenant("a", 2, last_used=1), tenant("b", 2, last_used=2)]
    assert made.decide(tenants, 0.0).evict == ["a", "b"]


def test_preparing_alone_demotes() -> None:
    made = rooms(10, 6, ticket(0, 3), prepared=3, prepared_used=3)
    decision = made.decide([tenant("a", 3, 3), tenant("host only", 3, 0)], 0.0)
    assert (decision.demote, decision.evict) == (["a"], [])
    assert made.freeing == Room(0, 3)


def test_small_ones_pass_until_the_first_has_waited_for_long() -> None:
    busy = [tenant("busy", 8, idle=False)]
    large, small = ticket(9), ticket(2)
    assert rooms(10, 8, large, small).decide(busy, 0.5).granted == [small]
    decision = rooms(10, 8, large, small).decide(busy, 1.0)
    assert decision.granted == []
    assert decision.hold_back == {"busy"}


def test_no_more_is_held_back_than_is_needed() -> None:
    tenants = [tenant(n, 3, idle=False, last_used=i) for i, n in enumerate(("x", "y", "z"))]
    assert rooms(9, 9, ticket(5)).decide(iter(tenants), 2.0).hold_back == {"x", "y"}


@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=6),
    st.lists(st.integers(0, 12), max_size=6),
    st.floats(0, 2),
)
def test_never_over_the_budget(
    budget: int, held: list[tuple[int, bool]], needs: list[int], now: float
) -> None:
    tenants = [tenant(str(n), size, idle=idle, last_used=n) for n, (size, idle) in enumerate(held)]
    used = sum(size for size, _ in held)
    budget = max(budget, used)
    # What needs more than the whole budget is refused before it queues (flights.py).
    made = rooms(budget, used, *(ticket(min(need, budget)) for need in needs))
    decision = made.decide(iter(tenants), now)
    assert made.used.host <= made.budget.host
    assert made.used.host == used + sum(t.need.host for t in decision.granted)
    assert made.freeing.host == sum(held[int(name)][0] for name in decision.evict)
    assert all(held[int(name)][1] for name in decision.evict), "only what nobody holds"
    assert len(decision.granted) + len(made.queue) == len(needs)
    assert not any(t.need.host == 0 for t in made.queue) or decision.hold_back
