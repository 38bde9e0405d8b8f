"""Shares: who has had the least is next, nobody saves up, nobody waits for ever."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.serve.answer import Job
from lorakit.serve.fairness import FairQueue
from lorakit.serve.requests import GenerationRequest
from lorakit.serve.stream import Stream

_ORDER = iter(range(10**9))


def job(
    tenant: str | None = None, digest: str | None = None, prompt: int = 10, at: float = 0.0, **more: Any
) -> Job:
    lease: Any = (
        None if digest is None else SimpleNamespace(version=SimpleNamespace(digest=digest, name=digest))
    )
    asked = GenerationRequest([1] * prompt, lease, tenant=tenant, **more)
    return Job(asked, Stream(asked.id), next(_ORDER), at)


def begin(one: Job) -> bool:
    """Make room: an answer that has its whole prompt to read."""
    one.answers = [SimpleNamespace(unread=len(one.request.prompt), started=False)]  # type: ignore[list-item]
    return True


def admitted(queue: FairQueue, count: int, now: float = 0.0) -> list[Job]:
    left = count

    def place(one: Job) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and begin(one)

    return queue.admit(now, place)


def finish(queue: FairQueue, one: Job) -> None:
    queue.charge(one, len(one.request.prompt), decoded=False)
    queue.left(one)


def test_tenants_take_turns_whoever_asks_more() -> None:
    queue = FairQueue(aging=99)
    for _ in range(8):
        queue.add(job("greedy"))
    for _ in range(3):
        queue.add(job("modest"))
    assert [one.request.tenant for one in admitted(queue, 6)].count("modest") == 3


def test_adapters_of_a_tenant_take_turns_and_their_number_gives_no_more() -> None:
    queue = FairQueue(aging=99)
    for digest in "abcdef":
        queue.add(job("many", digest))
        queue.add(job("many", digest))
    for _ in range(6):
        queue.add(job("one", "z"))
    first = admitted(queue, 6)
    assert [one.request.tenant for one in first].count("one") == 3
    assert len({one.digest for one in first if one.request.tenant == "many"}) == 3


def test_long_prompts_count_more() -> None:
    queue = FairQueue(aging=99)
    for _ in range(4):
        queue.add(job("long", prompt=100))
        queue.add(job("short", prompt=25))
        queue.add(job("short", prompt=25))
    first = admitted(queue, 6)
    assert sum(len(one.request.prompt) for one in first if one.request.tenant == "long") <= 200


def test_who_was_away_saves_nothing_up() -> None:
    queue = FairQueue(aging=99)
    for _ in range(20):
        queue.add(job("busy"))
    for one in admitted(queue, 10):
        finish(queue, one)
    for _ in range(20):
        queue.add(job("returned"))
    first = [one.request.tenant for one in admitted(queue, 6)]
    assert first.count("busy") == 3


def test_higher_priority_first_and_age_before_priority() -> None:
    queue = FairQueue(aging=5)
    old, low, high = job(at=0.0), job(at=9.0), job(at=9.0, priority=3)
    for one in (old, low, high):
        queue.add(one)
    assert admitted(queue, 3, now=10.0) == [old, high, low]


def test_what_is_freed_is_for_the_one_who_waited_too_long() -> None:
    queue = FairQueue(aging=5)
    large, small = job("a", prompt=100, at=0.0), job("b", at=0.0)
    queue.add(large)
    queue.add(small)

    def place(one: Job) -> bool:
        return len(one.request.prompt) < 50 and begin(one)

    assert queue.admit(1.0, place) == [small]  # goes past while that is still fair
    other = job("b", at=6.0)
    queue.add(other)
    assert queue.admit(6.0, place) == []
    assert queue.admit(6.0, begin) == [large, other]


def test_late_requests_are_taken_out() -> None:
    queue = FairQueue(aging=5)
    late, timely, gone = job(deadline=2.0), job(deadline=8.0), job(deadline=1.0)
    for one in (late, timely, gone):
        queue.add(one)
    assert queue.remove(gone.request.id) is gone
    assert queue.remove(gone.request.id) is None
    assert queue.expired(3.0) == [late]
    assert list(queue) == [timely]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "admit", "finish", "expire", "remove"]),
            st.integers(0, 5),
            st.integers(0, 5),
        ),
        max_size=60,
    )
)
def test_accounts_close_when_nobody_uses_them(steps: list[tuple[str, int, int]]) -> None:
    queue, running, waiting, now = FairQueue(aging=3), [], [], 0.0
    for what, a, b in steps:
        now += 1
        if what == "add":
            one = job(f"t{a % 3}", f"d{b}", prompt=1 + 7 * a, at=now, deadline=now + 4 if b == 1 else None)
            queue.add(one)
            waiting.append(one)
        elif what == "admit":
            for one in admitted(queue, b, now):
                running.append(one)
                waiting.remove(one)
        elif what == "finish" and running:
            finish(queue, running.pop(a % len(running)))
        elif what == "expire":
            for one in queue.expired(now):
                waiting.remove(one)
                queue.left(one)
        elif what == "remove" and waiting:
            one = waiting.pop(a % len(waiting))
            assert queue.remove(one.request.id) is one
            queue.left(one)
        assert len(queue) == len(waiting)
        assert set(queue) == set(waiting)
    for one in list(running):
        finish(queue, one)
    for one in waiting:
        queue.remove(one.request.id)
        queue.left(one)
    assert queue._tenants.adapters == {}
    assert not queue._lines
