"""Numbers for Prometheus: vLLM's names for what vLLM measures, and `lorakit_` for what each adapter does.

Routers that look for a replica by its adapters (Gateway API Inference Extension, llm-d) read `vllm:lora_requests_info`.
An adapter's name is a label only once it has been loaded, so strangers cannot fill the memory with names; all mixes
together are `mix`, the base is `base`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorakit.serve.api.record import RequestRecord

if TYPE_CHECKING:
    from lorakit.serve.server import Server

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_BETWEEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)

BASE, MIX = "base", "mix"


class Metrics:
    """All series of one server, in a registry of their own."""

    def __init__(self, server: Server) -> None:
        self.registry = CollectorRegistry()
        self._model = server.name

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(server.name)

        self._first = histogram("vllm:time_to_first_token_seconds", "Until the first token.", _SECONDS)
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two tokens.", _BETWEEN)
        self._whole = histogram(
            "vllm:e2e_request_latency_seconds", "Until the answer was complete.", _SECONDS
        )
        self._queued = histogram("vllm:request_queue_time_seconds", "Until the engine began.", _SECONDS)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self._prompt = counter("vllm:prompt_tokens", "Tokens read.", "model_name").labels(server.name)
        self._written = counter("vllm:generation_tokens", "Tokens written.", "model_name").labels(server.name)
        self._success = counter(
            "vllm:request_success", "Answers, by why they ended.", "model_name", "finished_reason"
        )
        self._http = counter("lorakit_http_requests", "Requests by status.", "path", "status")
        self._requests = counter("lorakit_adapter_requests", "Answered requests.", "adapter")
        self._adapter_prompt = counter("lorakit_adapter_prompt_tokens", "Tokens read.", "adapter")
        self._adapter_written = counter("lorakit_adapter_generated_tokens", "Tokens written.", "adapter")
        self._adapter_first = counter(
            "lorakit_adapter_first_token_seconds", "Sum of the times until the first token.", "adapter"
        )
        self._tenants = counter("lorakit_tenant_generated_tokens", "Tokens written.", "tenant")
        self.registry.register(_Live(server))

    def between(self, seconds: float) -> None:
        """Two tokens of an answer came this far apart."""
        self._between.observe(seconds)

    def count(self, record: RequestRecord) -> None:
        """A request is over."""
        path = record.path if record.path in _PATHS else "other"
        self._http.labels(path, str(record.status or 0)).inc()
        if record.prompt_tokens is None or record.completion_tokens is None:
            return
        name = adapter_label(record.adapter)
        self._requests.labels(name).inc()
        self._prompt.inc(record.prompt_tokens)
        self._adapter_prompt.labels(name).inc(record.prompt_tokens)
        self._written.inc(record.completion_tokens)
        self._adapter_written.labels(name).inc(record.completion_tokens)
        if record.tenant.name is not None:
            self._tenants.labels(record.tenant.name).inc(record.completion_tokens)
        for reason in record.finish:
            self._success.labels(self._model, reason).inc()
        if record.first_token is not None:
            self._first.observe(record.first_token)
            self._adapter_first.labels(name).inc(record.first_token)
        if record.queued is not None:
            self._queued.observe(record.queued)
        self._whole.observe(record.age)


def adapter_label(version: str | None) -> str:
    """What an adapter is called in labels: its name without the version."""
    if version is None:
        return BASE
    return MIX if ":" in version else version.partition("@")[0]


_PATHS = frozenset(
    {
        "/",
        "/generate",
        "/generate_stream",
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/v1/adapters",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/load_lora_adapter",
        "/v1/models",
        "/v1/state",
        "/v1/unload_lora_adapter",
    }
)


class _Live(Collector):
    """What is true at the moment of asking: read from the engine and the store, kept nowhere else."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: there may be no engine yet."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All gauges."""
        server = self._server
        state, stats, entries = server.engine.state(), server.store.stats(), server.store.list()
        model = {"model_name": server.name}
        yield _gauge("vllm:num_requests_running", "Answers being written.", state.running, model)
        yield _gauge("vllm:num_requests_waiting", "Requests that wait for room.", state.waiting, model)
        used = state.kv_tokens / max(1, state.kv_capacity)
        yield _gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", used, model)
        prefix = state.prefix
        for name, text, value in (
            ("vllm:prefix_cache_queries", "Tokens looked up.", prefix.queried if prefix else 0),
            ("vllm:prefix_cache_hits", "Tokens found.", prefix.hit if prefix else 0),
            ("lorakit_adapter_cache_hits", "Requests whose adapter was in memory.", stats.hits),
            ("lorakit_adapter_cache_misses", "Requests whose adapter had to be loaded.", stats.misses),
            ("lorakit_adapter_loads", "Adapters read.", stats.loads),
            ("lorakit_adapter_load_failures", "Adapters that could not be read.", stats.failures),
            ("lorakit_adapter_evictions", "Adapters that left memory to make room.", stats.evictions),
            ("lorakit_engine_steps", "Steps computed.", state.steps),
            ("lorakit_engine_restarts", "Restarts after a failure.", state.restarts + server.restarts),
        ):
            yield _total(name, text, value, model)
        yield self._requests_info(state.running_adapters, state.waiting_adapters)
        gauges: tuple[tuple[str, str, float], ...] = (
            ("lorakit_engine_alive", "1 while the engine runs.", float(server.engine.alive)),
            ("lorakit_tokens_per_second", "Of answers, over the last ten seconds.", state.tokens_per_second),
            ("lorakit_step_seconds", "Time of the last step.", state.last_step.seconds),
            ("lorakit_step_adapters", "Different adapters in the last step.", state.last_step.adapters),
            ("lorakit_adapter_memory_bytes", "Memory of all adapters.", stats.bytes),
            ("lorakit_adapter_memory_limit_bytes", "Memory that adapters may take.", stats.max_bytes),
            ("lorakit_adapters_in_memory", "Adapters in memory.", stats.contents),
            ("lorakit_adapters_loading", "Adapters being read.", stats.loading),
        )
        for name, text, number in gauges:
            yield _gauge(name, text, number, model)
        size = GaugeMetricFamily("lorakit_adapter_bytes", "Memory of an adapter.", labels=["adapter"])
        flight = GaugeMetricFamily("lorakit_adapter_in_flight", "Requests that use it.", labels=["adapter"])
        for entry in entries:
            if entry.tier != "disk" and entry.alias_of is None:
                size.add_metric([entry.name], entry.bytes or 0)
                flight.add_metric([entry.name], entry.in_use)
        yield size
        yield flight

    def _requests_info(self, running: Iterable[str | None], waiting: Iterable[str | None]) -> Metric:
        """VLLM's labels: the adapters at work and those that wait, as lists; the value is the time of asking."""
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with running and with waiting requests.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        most = self._server.limits.adapters_per_step or self._server.limits.running
        lists = [",".join(sorted(name for name in names if name is not None)) for names in (running, waiting)]
        info.add_metric([str(most), *lists], time.time())
        return info


def _gauge(name: str, text: str, value: float, labels: dict[str, str]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _total(name: str, text: str, value: float, labels: dict[str, str]) -> Metric:
    family = CounterMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
