"""The program with two replicas: adapters keep to theirs, deaths lose nothing, changes reach all."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.http_world import chat, error_of, save_adapter, save_world, until
from tests.serve.program import Program

KEYS = {
    "keys": [
        {"key": "sk-admin-1", "tenant": "ops", "adapters": ["*"], "admin": True},
        {"key": "sk-plain-1", "tenant": "acme", "adapters": ["acme-*"], "in_flight": 1},
    ]
}
ADMIN, PLAIN = ({"Authorization": f"Bearer {key}"} for key in ("sk-admin-1", "sk-plain-1"))

pytestmark = pytest.mark.slow


class Replicas:
    """The program, and ways to ask it."""

    def __init__(self, folder: Path) -> None:
        keys = folder / "keys.json"
        keys.write_text(json.dumps(KEYS))
        self.program = Program(
            folder, "-a", folder / "adapters", "--replicas", 2, "--keys", keys, "--runner", "transformers"
        )
        self.client = httpx.Client(
            base_url=self.program.url,
            headers=ADMIN,
            timeout=120,
            trust_env=False,
            limits=httpx.Limits(max_connections=64),
        )

    def ask(self, model: str, text: str = "hello", **more: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=chat(model, text, **more))

    def text(self, model: str, **more: Any) -> str:
        answer = self.ask(model, **more)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    def home(self, model: str) -> int:
        return int(self.ask(model, max_tokens=1).headers["x-lorakit-replica"])

    def state(self) -> dict[str, Any]:
        return dict(self.client.get("/v1/state").json())

    def pid(self, replica: int) -> int:
        return int(self.state()["replicas"][replica]["pid"])

    def all_ready(self) -> bool:
        return all(replica["state"] == "ready" for replica in self.state()["replicas"])


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    folder = save_world(tmp_path_factory.mktemp("replicas"))
    save_adapter(folder / "adapters" / "code", seed=4)  # its home is the other one
    made = Replicas(folder)
    yield made
    made.client.close()
    made.program.process.kill()
    made.program.process.communicate()


def test_an_adapter_keeps_to_its_replica(several: Replicas) -> None:
    assert several.program.lines[-2] == "replicas  2, each with its own copy of the base"
    homes = {
        model: {several.home(model) for _ in range(4)} for model in ("sql", "style", "acme-secret", "code")
    }
    assert all(len(home) == 1 for home in homes.values())
    assert set.union(*homes.values()) == {0, 1}
    listed = {e["id"]: e for e in several.client.get("/v1/adapters").json()["data"]}
    assert {name: set(listed[name]["replicas"]) for name in homes} == homes
    assert listed["sql"]["loads"] == 1
    assert listed["sql"]["hits"] >= 4
    models = [model["id"] for model in several.client.get("/v1/models").json()["data"]]
    assert models == ["tiny", "acme-secret", "code", "sql", "style"]


def test_streams_and_errors_come_through(several: Replicas) -> None:
    with several.client.stream("POST", "/v1/chat/completions", json=chat("sql", stream=True)) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    told = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in lines[:-1])
    assert told == several.text("sql")
    assert error_of(several.ask("nope"))[:3] == (404, "not_found_error", "model_not_found")
    assert error_of(several.client.post("/v1/chat/completions", content=b"{"))[0] == 400
    assert error_of(several.client.get("/v1/nothing"))[0] == 404
    answer = several.client.post("/generate", json={"inputs": "x", "parameters": {"adapter_id": "sql"}})
    assert answer.status_code == 200
    assert answer.headers["x-adapter-version"] == "sql@1"
    given = several.client.get("/health/ready", headers={"X-Request-Id": "mine"})
    assert given.headers["x-request-id"] == "mine"
    assert given.json() == {"status": "ready", "model": "tiny", "replicas": 2, "ready": 2}


def test_keys_and_a_tenants_limit_hold_at_the_router(several: Replicas) -> None:
    for path in ("/v1/models", "/metrics", "/v1/state"):
        assert error_of(httpx.get(several.program.url + path, trust_env=False))[0] == 401
    assert error_of(several.client.get("/metrics", headers=PLAIN))[0] == 403
    assert error_of(several.client.post("/v1/adapters", json={"name": "sql"}, headers=PLAIN))[0] == 403
    models = several.client.get("/v1/models", headers=PLAIN).json()["data"]
    assert [model["id"] for model in models] == ["tiny", "acme-secret"]
    body = chat("tiny", max_tokens=300, ignore_eos=True)

    def one(number: int) -> int:
        return several.client.post("/v1/chat/completions", json=body, headers=PLAIN).status_code

    with ThreadPoolExecutor(4) as pool:
        codes = sorted(pool.map(one, range(4)))
    assert codes[0] == 200
    assert codes[-1] == 429, "one at a time, at both replicas together"


def test_a_hot_adapter_is_answered_by_both(several: Replicas) -> None:
    expected, before = several.text("sql", max_tokens=100), several.state()["router"]["spills"]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: several.ask("sql", max_tokens=100), range(32)))
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {expected}
    assert {answer.headers["x-lorakit-replica"] for answer in answers} == {"0", "1"}
    assert several.state()["router"]["spills"] > before
    metrics = several.client.get("/metrics").text
    for replica in "01":
        assert f'lorakit_adapter_requests_total{{adapter="sql",replica="{replica}"}}' in metrics
        assert f'lorakit_replica_ready{{replica="{replica}"}} 1.0' in metrics


def test_a_killed_replica_loses_no_request_and_comes_back_with_all_changes(several: Replicas) -> None:
    loaded = several.client.post("/v1/adapters", json={"name": "extra", "source": "style", "pinned": True})
    assert loaded.status_code == 201
    assert loaded.json()["replicas"] == [0, 1]
    assert several.client.post("/v1/adapters/style/alias", json={"alias": "prod"}).status_code == 201
    assert several.home("prod") == several.home("style")
    asked = {
        model: several.text(model, max_tokens=250, ignore_eos=True)
        for model in ("sql", "style", "extra", "prod")
    }
    models = list(asked) * 3
    victim = several.home("sql")
    pid = several.pid(victim)
    with ThreadPoolExecutor(len(models)) as pool:
        answers = [pool.submit(several.text, model, max_tokens=250, ignore_eos=True) for model in models]
        until(lambda: several.state()["replicas"][victim]["in_hand"] > 0)
        os.kill(pid, signal.SIGKILL)
        assert [answer.result() for answer in answers] == [asked[model] for model in models]
    assert several.state()["router"]["retries"] > 0
    until(several.all_ready, 90)
    assert several.pid(victim) != pid
    assert several.state()["replicas"][victim]["restarts"] == 1
    extra = several.client.get("/v1/adapters/extra").json()
    assert (extra["pinned"], extra["replicas"]) == (True, [0, 1]), (
        "it was told what the other one had been told"
    )
    assert several.home("sql") == victim
    assert several.text("prod", max_tokens=250, ignore_eos=True) == asked["prod"]


def test_a_stream_whose_replica_dies_says_so(several: Replicas) -> None:
    until(several.all_ready, 90)
    body = chat("sql", max_tokens=900, ignore_eos=True, stream=True)
    with several.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert next(lines).startswith("data: ")
        os.kill(several.pid(int(answer.headers["x-lorakit-replica"])), signal.SIGKILL)
        last = list(lines)[-1]
    assert json.loads(last[6:])["error"]["code"] == "engine_dead"


def test_unloading_reaches_all(several: Replicas) -> None:
    until(several.all_ready, 90)
    body = {"lora_name": "sql2", "lora_path": "sql"}
    assert several.client.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert several.client.get("/v1/adapters/sql2").json()["replicas"] == [0, 1]
    assert error_of(several.client.post("/v1/load_lora_adapter", json=body))[2] == "adapter_exists"
    gone = several.client.delete("/v1/adapters/sql2")
    assert gone.json() == {"id": "sql2", "object": "adapter.unloaded", "status": "unloaded", "in_flight": 0}
    assert error_of(several.ask("sql2"))[0] == 404
    assert error_of(several.client.delete("/v1/adapters/sql2"))[0] == 404
    missing = several.client.post("/v1/adapters", json={"name": "missing"})
    assert error_of(missing)[2] == "adapter_not_found"


def test_sigterm_finishes_what_is_in_hand_and_leaves_no_process(several: Replicas) -> None:
    until(several.all_ready, 90)
    pids = [several.pid(0), several.pid(1)]
    events: list[str] = []
    begun = threading.Event()

    def read() -> None:
        body = chat("sql", max_tokens=400, ignore_eos=True, stream=True)
        with several.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                events.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(20)
    several.program.process.send_signal(signal.SIGTERM)
    while (answer := several.ask("sql", max_tokens=1)).status_code == 200:  # until the signal has arrived
        time.sleep(0.01)
    assert error_of(answer)[2] == "shutting_down"
    reader.join(60)
    assert [event for event in events if event][-1] == "data: [DONE]"
    code, log = several.program.end()
    assert code == 0
    assert {"replica_died", "replica_restarted", "retried"} <= {entry["event"] for entry in log}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
