"""What all replicas say together: models, adapters, state and metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from lorakit.serve.router.fleet import Fleet

_TIERS = ("disk", "host", "prepared")
_ADDED = ("in_flight", "hits", "loads")
_LARGEST = ("seconds",)


def merged_lists(lists: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The models or adapters of all replicas, each once, in the order in which they come.

    Args:
        lists: What each replica lists, by the replica's number.
    """
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for index, entries in lists.items():
        for entry in entries:
            found.setdefault(entry["id"], {})[index] = entry
    return [merged(entries) for entries in found.values()]


def merged(entries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """One model or adapter, as several replicas tell of it.

    What counts uses is added up; what a replica that has not read it cannot know comes from one that has.

    Args:
        entries: What each says, by the replica's number.
    """
    several = list(entries.values())
    whole = dict(several[0])
    for name in whole:
        known = [entry[name] for entry in several if entry.get(name) is not None]
        if name in _ADDED:
            whole[name] = sum(known)
        elif name == "tier":
            whole[name] = max(known, key=_TIERS.index)
        elif name == "pinned":
            whole[name] = any(known)
        elif name == "idle_seconds":
            whole[name] = min(known, default=None)
        elif name == "versions":
            whole[name] = sorted({number for numbers in known for number in numbers})
        elif known:
            whole[name] = known[0] or max(known, key=bool)
    if "tier" in whole:
        whole["replicas"] = [index for index, entry in entries.items() if entry["tier"] != "disk"]
    return whole


def added(values: Sequence[Any]) -> Any:
    """Several states as one: numbers are added, truths must all hold, of texts the first counts."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if isinstance(known[0], bool):
        return all(known)
    if isinstance(known[0], (int, float)):
        return sum(known)
    if isinstance(known[0], Mapping):
        names = dict.fromkeys(name for value in known for name in value)
        return {
            name: (max if name in _LARGEST else added)([value[name] for value in known if name in value])
            for name in names
        }
    return known[0]


def metrics_text(texts: Mapping[int, str], fleet: Fleet) -> bytes:
    """Every replica's series with a label for the replica, and the router's own.

    Args:
        texts: What each says at `/metrics`, by its number.
        fleet: All of them.
    """
    registry = CollectorRegistry()
    registry.register(_Series(texts, fleet))
    return generate_latest(registry)


class _Series(Collector):
    def __init__(self, texts: Mapping[int, str], fleet: Fleet) -> None:
        self._texts, self._fleet = texts, fleet

    def collect(self) -> Iterable[Metric]:
        """All of them, each name once."""
        families: dict[str, Metric] = {}
        for index, text in self._texts.items():
            for told in text_string_to_metric_families(text):
                family = families.setdefault(told.name, Metric(told.name, told.documentation, told.type))
                for sample in told.samples:
                    labels = {**sample.labels, "replica": str(index)}
                    family.add_sample(sample.name, labels, sample.value, sample.timestamp, sample.exemplar)
        yield from families.values()
        ready = GaugeMetricFamily("lorakit_replica_ready", "1 while it takes requests.", labels=["replica"])
        in_hand = GaugeMetricFamily("lorakit_replica_in_hand", "Requests at it.", labels=["replica"])
        restarts = CounterMetricFamily(
            "lorakit_replica_restarts", "Starts after a death.", labels=["replica"]
        )
        for replica in self._fleet.replicas:
            number = [str(replica.index)]
            ready.add_metric(number, float(replica.state == "ready"))
            in_hand.add_metric(number, replica.in_hand)
            restarts.add_metric(number, replica.restarts)
        yield from (ready, in_hand, restarts)
        yield CounterMetricFamily(
            "lorakit_router_retries", "Requests put to another replica.", self._fleet.retries
        )
        yield CounterMetricFamily(
            "lorakit_router_spills",
            "Requests not answered by their adapter's replica, which had enough in hand.",
            self._fleet.spills,
        )
