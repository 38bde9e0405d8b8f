"""Serving on Ray: adapters keep to their replicas, and a replica's death loses no request."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serve.http_world import chat, save_world

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from ray import serve

    from lorakit.serve.ray_app import ray_application

    folder = save_world(tmp_path_factory.mktemp("ray"))
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, object_store_memory=80_000_000)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    build = {"threads": 1, "kv_tokens": 4096, "runner": "transformers"}
    application = ray_application(
        str(folder / "tiny"),
        str(folder / "adapters"),
        name="tiny",
        cpus=0.25,
        adapters_per_replica=2,
        build=build,
    )
    serve.run(application)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def ask(url: str, model: str, **more: Any) -> httpx.Response:
    body = chat(model, **more)
    return httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False, timeout=120)


def pid(answer: httpx.Response) -> str:
    return answer.headers["x-lorakit-process"]


def test_an_adapter_keeps_to_its_replica(url: str) -> None:
    first = ask(url, "sql")
    assert first.status_code == 200, first.text
    assert {pid(ask(url, "sql")) for _ in range(6)} == {pid(first)}


def test_errors_and_streams_come_through(url: str) -> None:
    assert ask(url, "nope").status_code == 404
    streamed = ask(url, "sql", stream=True).text
    assert streamed.endswith("data: [DONE]\n\n")
    assert streamed.count("data: ") > 3
    refused = httpx.post(f"{url}/v1/adapters", json={"name": "sql"}, trust_env=False, timeout=60)
    assert refused.status_code == 400
    models = httpx.get(f"{url}/v1/models", trust_env=False, timeout=60).json()["data"]
    assert [model["id"] for model in models] == ["tiny", "acme-secret", "sql", "style"]


def test_more_adapters_than_ray_counts_leave_those_in_use_alone(url: str) -> None:
    expected = {model: ask(url, model).json()["choices"] for model in ("sql", "style", "acme-secret", "tiny")}
    for _ in range(2):
        for model, choices in expected.items():
            assert ask(url, model).json()["choices"] == choices


def test_a_killed_replica_loses_no_request(url: str) -> None:
    home = int(pid(ask(url, "sql")))
    expected = ask(url, "sql", max_tokens=300, ignore_eos=True).json()["choices"]
    answers: list[httpx.Response] = []

    def one() -> None:
        answers.append(ask(url, "sql", max_tokens=300, ignore_eos=True))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    threading.Event().wait(0.3)
    os.kill(home, signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    assert [answer.status_code for answer in answers] == [200] * 4
    assert all(answer.json()["choices"] == expected for answer in answers)
