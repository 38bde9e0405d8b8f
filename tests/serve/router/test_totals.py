"""What replicas say together."""

from __future__ import annotations

from typing import Any

from lorakit.serve.router.fleet import Fleet
from lorakit.serve.router.replica import Replica
from lorakit.serve.router.totals import added, merged_lists, metrics_text


def entry(name: str, **known: Any) -> dict[str, Any]:
    unread = {
        "digest": None,
        "tier": "disk",
        "pinned": False,
        "in_flight": 0,
        "hits": 0,
        "idle_seconds": None,
    }
    return {"id": name, **unread, "versions": [], **known}


def test_adapters_are_listed_once_with_what_is_known_of_them() -> None:
    read = {
        "digest": "d",
        "tier": "prepared",
        "in_flight": 2,
        "hits": 5,
        "idle_seconds": 1.0,
        "versions": [1],
    }
    lists = {
        0: [entry("a"), entry("b")],
        1: [entry("a", **read), entry("b", pinned=True, hits=1), entry("c")],
    }
    a, b, c = merged_lists(lists)
    assert a == {"id": "a", **read, "pinned": False, "replicas": [1]}
    assert (b["pinned"], b["hits"], b["replicas"], c["id"]) == (True, 1, [], "c")


def test_states_are_added_up() -> None:
    one = {"model": "t", "alive": True, "n": 1, "last_step": {"seconds": 0.5, "rows": 2}, "prefix": None}
    two = {
        "model": "t",
        "alive": False,
        "n": 2,
        "last_step": {"seconds": 0.2, "rows": 3},
        "prefix": None,
        "by": {"a": 1},
    }
    assert added([one, two]) == {
        "model": "t",
        "alive": False,
        "n": 3,
        "last_step": {"seconds": 0.5, "rows": 5},
        "prefix": None,
        "by": {"a": 1},
    }


def test_metrics_have_a_label_for_the_replica_and_one_description() -> None:
    text = (
        '# HELP lorakit_x_total Things.\n# TYPE lorakit_x_total counter\nlorakit_x_total{adapter="sql"} %d\n'
    )
    fleet = Fleet([Replica(0, []), Replica(1, [])])
    fleet.replicas[1].state, fleet.replicas[1].restarts, fleet.retries = "ready", 2, 3
    lines = metrics_text({0: text % 4, 1: text % 5}, fleet).decode().splitlines()
    assert lines.count("# HELP lorakit_x_total Things.") == 1
    for line in (
        'lorakit_x_total{adapter="sql",replica="0"} 4.0',
        'lorakit_x_total{adapter="sql",replica="1"} 5.0',
        'lorakit_replica_ready{replica="0"} 0.0',
        'lorakit_replica_ready{replica="1"} 1.0',
        'lorakit_replica_restarts_total{replica="1"} 2.0',
        "lorakit_router_retries_total 3.0",
    ):
        assert line in lines
