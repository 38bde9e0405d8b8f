"""Which replica answers for which adapter."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorakit.serve.router.placement import AT_LEAST, OVER_MEAN, bound, preference, rendezvous

KEYS = [f"adapter-{number}" for number in range(400)]


def test_the_order_is_the_same_in_every_run() -> None:
    assert [rendezvous(key, range(4))[0] for key in ("sql", "style", "acme-secret", "prod")] == [0, 2, 0, 1]


def test_keys_spread_over_the_replicas() -> None:
    homes = [rendezvous(key, range(4))[0] for key in KEYS]
    assert all(60 < homes.count(replica) < 140 for replica in range(4))


def test_a_replica_that_goes_moves_its_own_keys_alone_and_to_several() -> None:
    moved = []
    for key in KEYS:
        before, after = rendezvous(key, range(4))[0], rendezvous(key, (0, 1, 3))[0]
        if before == 2:
            moved.append(after)
        else:
            assert after == before
    assert set(moved) == {0, 1, 3}


def test_the_base_goes_to_the_idlest() -> None:
    assert preference(None, {0: 3, 1: 1, 2: 1}) == [1, 2, 0]
    assert preference("sql", {}) == []


@given(st.text(max_size=20), st.dictionaries(st.integers(0, 9), st.integers(0, 200), min_size=1))
def test_nobody_gets_more_than_its_bound(key: str, loads: dict[int, int]) -> None:
    order = preference(key, loads)
    assert sorted(order) == sorted(loads)
    most = max(AT_LEAST, OVER_MEAN * (sum(loads.values()) + 1) / len(loads))
    assert bound(sum(loads.values()), len(loads)) < most + 1
    assert loads[order[0]] < most, "someone is always below the bound"
    best = rendezvous(key, loads)
    assert all(loads[index] >= most for index in best[: best.index(order[0])])
