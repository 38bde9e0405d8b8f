"""Prometheus' series, as a scraper reads them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lorakit.serve.api.metrics import adapter_label
from tests.serve.http_world import Running, World, chat, until


@pytest.fixture
def world(own_folder: Path) -> Iterator[World]:
    with Running(own_folder) as running:
        yield running


def scrape(world: World) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = world.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_series_of_each_adapter(world: World) -> None:
    for _ in range(2):
        world.ask("sql", max_tokens=5)
    world.ask("tiny", max_tokens=4)
    world.ask("sql:0.5+style:0.5", max_tokens=3)
    world.post("/v1/chat/completions", chat("no-such-adapter"))
    found = scrape(world)
    assert found[key("lorakit_adapter_requests_total", adapter="sql")] == 2
    assert found[key("lorakit_adapter_generated_tokens_total", adapter="sql")] == 10
    assert found[key("lorakit_adapter_generated_tokens_total", adapter="base")] == 4
    assert found[key("lorakit_adapter_generated_tokens_total", adapter="mix")] == 3
    assert found[key("vllm:generation_tokens_total", model_name="tiny")] == 17
    assert found[key("vllm:time_to_first_token_seconds_count", model_name="tiny")] == 4
    assert found[key("vllm:e2e_request_latency_seconds_count", model_name="tiny")] == 4
    assert found[key("vllm:inter_token_latency_seconds_count", model_name="tiny")] == 17 - 4
    assert found[key("vllm:request_success_total", model_name="tiny", finished_reason="length")] == 4
    assert found[key("lorakit_http_requests_total", path="/v1/chat/completions", status="404")] == 1
    assert found[key("lorakit_adapter_bytes", adapter="sql")] == world.get("/v1/adapters/sql").json()["bytes"]
    assert not [name for name, labels in found if "no-such-adapter" in str(labels)]


def test_a_strangers_paths_make_no_series(world: World) -> None:
    for i in range(5):
        world.get(f"/v1/made-up-{i}")
    found = scrape(world)
    assert found[key("lorakit_http_requests_total", path="other", status="404")] == 5


def test_adapters_at_work_in_the_labels_that_routers_read(world: World) -> None:
    body = chat("sql", max_tokens=900, ignore_eos=True)
    asking = threading.Thread(target=lambda: world.post("/v1/chat/completions", body))
    asking.start()
    until(lambda: world.server.engine.state().running == 1)
    found = scrape(world)
    labels = {"max_lora": "32", "running_lora_adapters": "sql", "waiting_lora_adapters": ""}
    assert found[key("vllm:lora_requests_info", **labels)] > 1.7e9
    assert found[key("vllm:num_requests_running", model_name="tiny")] == 1
    assert 0 < found[key("vllm:kv_cache_usage_perc", model_name="tiny")] <= 1
    assert found[key("lorakit_adapter_in_flight", adapter="sql")] == 1
    asking.join()


def test_state(world: World) -> None:
    world.ask("sql")
    state = world.get("/v1/state").json()
    assert state["alive"] is True
    assert state["engine"]["generated_tokens"] == 12
    assert state["adapters"]["contents"] == 1
    assert state["draining"] is False


def test_labels() -> None:
    assert [adapter_label(v) for v in (None, "sql@3", "a:0.5+b:0.5")] == ["base", "sql", "mix"]
