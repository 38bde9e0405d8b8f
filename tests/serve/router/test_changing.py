"""Changes of the adapters: made everywhere or nowhere, and kept for replicas that start later."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from lorakit.serve.router.changing import change_all
from lorakit.serve.router.fleet import Fleet
from lorakit.serve.router.passing import Asked
from lorakit.serve.router.replica import Replica


class Servers:
    """Replicas that keep names, each with those it refuses."""

    def __init__(self, number: int = 2) -> None:
        self.names: list[set[str]] = [set() for _ in range(number)]
        self.refused: dict[int, str] = {}
        self.killed: list[int] = []
        replicas = [Counted(index, self) for index in range(number)]
        for replica in replicas:
            replica.url, replica.state = f"http://replica-{replica.index}", "ready"
        client = httpx.AsyncClient(transport=httpx.MockTransport(self.handle))
        self.fleet = Fleet(replicas, client=client)
        self.gone: set[int] = set()

    async def handle(self, request: httpx.Request) -> httpx.Response:
        index = int(request.url.host.removeprefix("replica-"))
        if index in self.gone:
            raise httpx.ConnectError("nobody there")
        path, names = request.url.path, self.names[index]
        if path == "/health/ready":
            return httpx.Response(200, json={"model": "tiny"})
        if request.method == "GET":
            return httpx.Response(200, json={"data": []})
        body = json.loads(request.content) if request.content else {}
        name = body.get("name") or path.split("/")[3]
        if request.method == "DELETE":
            code = 200 if name in names else 404
            names.discard(name)
            report = {"id": name, "status": "draining", "in_flight": index}
            return httpx.Response(code, json=report if code == 200 else {})
        if path.endswith("/alias"):
            if name not in names:
                return httpx.Response(404, json={})
            names.add(body["alias"])
        elif self.refused.get(index) == name:
            return httpx.Response(503, json={"error": {"code": "adapter_capacity"}})
        elif name in names:
            return httpx.Response(409, json={})
        names.add(name)
        return httpx.Response(201, json={"id": name, "tier": "prepared"})

    def change(self, method: str, target: str, body: dict[str, Any] | None = None) -> httpx.Response:
        content = b"" if body is None else json.dumps(body).encode()
        return asyncio.run(change_all(self.fleet, Asked(method, target, {}, content, "req-1")))


class Counted(Replica):
    """A replica without a process."""

    def __init__(self, index: int, servers: Servers) -> None:
        super().__init__(index, [])
        self.servers = servers

    async def kill(self) -> None:
        self.servers.killed.append(self.index)
        self.state = "dead"


@pytest.fixture
def servers() -> Servers:
    return Servers()


def test_a_load_reaches_all_and_is_kept(servers: Servers) -> None:
    answer = servers.change("POST", "/v1/adapters", {"name": "sql"})
    assert (answer.status_code, answer.json()) == (201, {"id": "sql", "tier": "prepared", "replicas": [0, 1]})
    assert servers.names == [{"sql"}, {"sql"}]
    assert [change.target for change in servers.fleet.changes] == ["/v1/adapters"]
    assert servers.change("POST", "/v1/adapters", {"name": "sql"}).status_code == 409
    assert len(servers.fleet.changes) == 1


def test_a_load_that_one_refuses_is_undone_at_the_other(servers: Servers) -> None:
    servers.refused[1] = "sql"
    assert servers.change("POST", "/v1/adapters", {"name": "sql"}).status_code == 503
    assert servers.names == [set(), set()]
    assert servers.fleet.changes == []


def test_one_that_has_it_already_makes_no_undoing(servers: Servers) -> None:
    servers.names[0].add("sql")
    assert servers.change("POST", "/v1/adapters", {"name": "sql"}).status_code == 409
    assert servers.names == [{"sql"}, {"sql"}]


def test_an_adapter_that_some_have_not_read_is_read_before_it_gets_a_further_name(servers: Servers) -> None:
    servers.names[1].add("sql")
    assert servers.change("POST", "/v1/adapters/sql/alias", {"alias": "prod"}).status_code == 201
    assert servers.names == [{"sql", "prod"}, {"sql", "prod"}]
    assert [change.target for change in servers.fleet.changes] == ["/v1/adapters", "/v1/adapters/sql/alias"]


def test_unloading_adds_up_what_is_in_flight_and_forgives_who_never_had_it(servers: Servers) -> None:
    servers.names[1].add("sql")
    answer = servers.change("DELETE", "/v1/adapters/sql")
    assert answer.json() == {"id": "sql", "status": "draining", "in_flight": 1}
    assert servers.change("DELETE", "/v1/adapters/sql").status_code == 404


def test_one_that_cannot_be_reached_is_ended_and_will_make_the_change_when_it_is_back(
    servers: Servers,
) -> None:
    servers.gone = {0}
    assert servers.change("POST", "/v1/adapters", {"name": "sql"}).status_code == 201
    assert servers.killed == [0]
    assert len(servers.fleet.changes) == 1
    servers.gone = {0, 1}
    answer = servers.change("POST", "/v1/adapters", {"name": "style"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    assert len(servers.fleet.changes) == 1
