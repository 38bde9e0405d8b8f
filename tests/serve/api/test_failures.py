"""Every failure that a server must answer in its own way, each provoked for real over HTTP.

The numbers are those of the rows of `docs/guide/serving.md`, "Errors".
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.serve.api.auth import Keys
from lorakit.serve.api.limits import Limits
from lorakit.serve.api.service import Options
from lorakit.serve.manifest import TrustedKeys, make_key, sign
from lorakit.serve.scheduler import EngineLimits
from tests.serve.http_world import BASE, Running, World, chat, error_of, save_adapter, until

INVALID = "invalid_request_error"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def world(own_folder: Path) -> Iterator[World]:
    with Running(own_folder, load_timeout=5, capacity_wait=0.3) as running:
        yield running
        running.idle()
        assert running.server.runner.arena.used == 0
        assert running.server.store.stats().in_use == 0


def load(world: World, source: str, **more: Any) -> httpx.Response:
    return world.post("/v1/adapters", {"name": "x", "source": source, **more})


def infer(world: World, model: str, **more: Any) -> httpx.Response:
    return world.post("/v1/chat/completions", chat(model, **more))


class Long:
    """A stream that is read in a thread, slowly enough to do something in the middle of it."""

    def __init__(self, world: World, model: str, tokens: int = 600, **headers: str) -> None:
        self.world = world
        self.body = {**chat(model, max_tokens=tokens, ignore_eos=True), "stream": True}
        self.events: list[str] = []
        self.headers = headers
        self.first = threading.Event()
        self.thread = threading.Thread(target=self._read)

    def __enter__(self) -> Long:
        self.thread.start()
        assert self.first.wait(20)
        return self

    def __exit__(self, *exception: object) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive()

    def _read(self) -> None:
        with (
            self.world.client() as client,
            client.stream("POST", "/v1/chat/completions", json=self.body, headers=self.headers) as answer,
        ):
            self.status = answer.status_code
            for line in answer.iter_lines():
                if line:
                    self.events.append(line[6:])
                    if len(self.events) > 3:
                        self.first.set()
        self.first.set()

    @property
    def text(self) -> str:
        bodies = [json.loads(event) for event in self.events if event != "[DONE]"]
        return "".join(b["choices"][0]["delta"].get("content", "") for b in bodies if "choices" in b)


# ---- 1 to 9: what is asked for is not there, or not right
@pytest.mark.parametrize("model", ["nope", "sql@7", "sql:0.5+nope:0.5", "Tiny"])
def test_01_unknown_model(world: World, model: str) -> None:
    wanted = (404, "not_found_error", "model_not_found", "model")
    assert error_of(infer(world, model)) == wanted
    assert error_of(infer(world, model, stream=True)) == wanted
    assert error_of(world.post("/v1/completions", {"model": model, "prompt": "a"})) == wanted


BAD_IDS = [
    "../sql",
    "/etc/passwd",
    "a/b",
    "..",
    ".hidden",
    "a\0b",
    "a b",
    "ü",
    "x" * 129,
    "sql@0",
    "sql@x",
    "sql@1@2",
    "%2e%2e",
]


@pytest.mark.parametrize("name", BAD_IDS)
def test_02_names_that_are_none(world: World, name: str) -> None:
    assert error_of(infer(world, name))[:3] == (400, INVALID, "invalid_adapter_id")
    assert error_of(world.post("/v1/adapters", {"name": name, "source": "sql"}))[:3] == (
        400,
        INVALID,
        "invalid_adapter_id",
    )


@pytest.mark.parametrize("source", ["../outside", "/etc", "sql/../../outside", "a\0b", "link", "~"])
def test_02_paths_that_lead_out(world: World, source: str) -> None:
    save_adapter(world.folder / "outside", seed=5)
    (world.adapters / "link").symlink_to(world.folder / "outside")
    answer = load(world, source)
    assert error_of(answer)[0] in (400, 404)
    assert error_of(answer)[2] in ("invalid_adapter_id", "adapter_not_found")
    assert world.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": source}).status_code >= 400
    if source == "link":
        assert infer(world, "link").status_code in (400, 404)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _header_bomb(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def _noise(path: Path) -> None:
    path.write_bytes(os.urandom(5000))


def _nan(path: Path) -> None:
    tensors = load_file(path)
    first = next(iter(tensors))
    tensors[first] = torch.full_like(tensors[first], float("nan"))
    save_file(tensors, path)


@pytest.mark.parametrize("damage", [_truncate, _header_bomb, _noise, _nan])
def test_03_corrupt_files(world: World, damage: Any) -> None:
    damage(save_adapter(world.adapters / "bad", seed=5) / WEIGHTS)
    assert error_of(load(world, "bad"))[:3] == (400, INVALID, "adapter_corrupt")
    assert error_of(infer(world, "bad"))[::2] == (424, "adapter_corrupt")
    world.ask("sql")  # nobody else notices


def test_04_pickles_are_never_opened(world: World) -> None:
    folder = save_adapter(world.adapters / "bad", seed=5)
    (folder / WEIGHTS).unlink()
    torch.save({"a": torch.zeros(1)}, folder / "adapter_model.bin")
    assert error_of(load(world, "bad"))[:3] == (400, INVALID, "unsafe_adapter_format")
    assert error_of(infer(world, "bad"))[2] == "unsafe_adapter_format"


def test_05_another_base(world: World) -> None:
    save_adapter(world.adapters / "bad", seed=5, hidden_size=64)
    assert error_of(load(world, "bad"))[::2] == (409, "adapter_base_mismatch")


def _extra_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.nobody.lora_A.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / WEIGHTS)


def _missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[next(iter(tensors))]
    save_file(tensors, folder / WEIGHTS)


def _unknown_type(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "MAGIC"}))


@pytest.mark.parametrize("change", [_extra_tensor, _missing_tensor, _unknown_type])
def test_06_incompatible(world: World, change: Any) -> None:
    change(save_adapter(world.adapters / "bad", seed=5))
    assert error_of(load(world, "bad"))[:3] == (400, INVALID, "adapter_incompatible")


def test_06_rank_over_the_limit(own_folder: Path) -> None:
    with Running(own_folder, max_rank=4) as world:
        assert error_of(load(world, "style"))[:3] == (400, INVALID, "adapter_incompatible")
        assert load(world, "sql").status_code == 201


def test_07_missing_files(world: World) -> None:
    (world.adapters / "empty").mkdir()
    for source in ("nowhere", "empty"):
        assert error_of(load(world, source))[:3] == (404, "not_found_error", "adapter_not_found")


def test_08_untrusted(own_folder: Path, tmp_path: Path) -> None:
    make_key(tmp_path / "ours")
    public = make_key(tmp_path / "theirs")
    for adapter, key in (("sql", "ours"), ("style", "theirs")):
        sign(own_folder / "adapters" / adapter, tmp_path / key)
    with Running(own_folder, trusted=TrustedKeys({public: "them"})) as world:
        assert infer(world, "style").status_code == 200
        for model in ("sql", "acme-secret"):  # signed by somebody else; not signed
            assert error_of(load(world, model))[:3] == (403, "permission_error", "adapter_untrusted")
        _nan(own_folder / "adapters" / "style" / WEIGHTS)
        assert error_of(load(world, "style"))[2] == "adapter_untrusted"


def test_09_the_name_exists(world: World) -> None:
    old = world.ask("sql", max_tokens=500)
    with Long(world, "sql", 500) as stream:
        answer = world.post("/v1/adapters", {"name": "sql", "source": "style"})
        assert error_of(answer)[::2] == (409, "adapter_exists")
        answer = world.post("/v1/adapters", {"name": "sql", "source": "style", "if_exists": "replace"})
        assert answer.json()["version"] == 2
        assert world.ask("sql", max_tokens=20) == world.ask("style", max_tokens=20)
    assert stream.text == old  # who had begun goes on with what it began with


# ---- 10 to 13: adapters come and go
def test_10_unload_drains(world: World) -> None:
    old = world.ask("sql", max_tokens=700)
    with Long(world, "sql", 700) as stream:
        with world.client() as client:
            body = client.delete("/v1/adapters/sql").json()
        assert (body["status"], body["in_flight"]) == ("draining", 1)
        assert error_of(infer(world, "sql"))[2] == "model_not_found"
    assert stream.text == old
    until(lambda: world.server.store.stats().draining == 0)


def test_10_16_unload_by_force_ends_the_stream_with_an_error(world: World) -> None:
    with Long(world, "sql", 900) as stream, world.client() as client:
        body = client.delete("/v1/adapters/sql?force=true").json()
        assert (body["status"], body["in_flight"]) == ("draining", 1)
    assert stream.status == 200
    assert stream.events[-1] != "[DONE]"
    error = json.loads(stream.events[-1])["error"]
    assert error["code"] == "request_aborted"
    assert set(error) == {"message", "type", "param", "code"}


def test_11_files_change_under_a_loaded_adapter(world: World) -> None:
    before = world.ask("sql")
    for name in (WEIGHTS, "adapter_config.json"):
        (world.adapters / "sql" / name).write_bytes((world.adapters / "style" / name).read_bytes())
    assert world.ask("sql") == before
    for path in (world.adapters / "sql").iterdir():
        path.unlink()
    (world.adapters / "sql").rmdir()
    assert world.ask("sql") == before


def test_12_a_load_that_hangs_delays_nobody(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Running(own_folder, load_timeout=3) as world:
        world.ask("sql")
        go = threading.Event()
        real = world.server.runner.prepare

        def hanging(version: Any) -> None:
            if version.name in ("style", "x"):
                go.wait(20)
            real(version)

        monkeypatch.setattr(world.server.runner, "prepare", hanging)
        answers: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: answers.append(infer(world, "style")))
        waiting.start()
        world.ask("sql")
        world.ask(BASE)
        assert not answers  # they were answered while it hung
        waiting.join(20)
        assert error_of(answers[0])[:3] == (504, "timeout_error", "adapter_load_timeout")
        go.set()


def test_13_no_room_for_an_adapter(own_folder: Path) -> None:
    with Running(own_folder, adapter_bytes=60_000, capacity_wait=0.3) as world:
        assert world.post("/v1/adapters", {"name": "sql", "pinned": True}).status_code == 201
        world.post("/v1/adapters", {"name": "acme-secret", "pinned": True})
        answer = infer(world, "style")
        assert error_of(answer)[:3] == (503, "overloaded_error", "adapter_capacity")
        assert int(answer.headers["retry-after"]) >= 1
        world.post("/v1/adapters/sql/pin", {"pinned": False})
        assert infer(world, "style").status_code == 200


# ---- 14 to 20: while answering
@pytest.mark.parametrize(("stream", "events"), [(True, 0), (True, 3), (False, 0)])
def test_14_a_client_that_goes_away_frees_its_request(
    world: World, stream: bool, events: int, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps({**chat("sql", max_tokens=900, ignore_eos=True), "stream": stream}).encode()
    host, port = world.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    until(lambda: world.server.engine.state().running == 1)
    assert world.server.runner.arena.used > 0
    read = b""
    while read.count(b"data: ") < events:
        read += connection.recv(1000)
    with caplog.at_level("INFO", logger="lorakit.serve"):
        connection.close()
        began = time.monotonic()
        world.idle()
    assert time.monotonic() - began < 2
    assert world.server.runner.arena.used == 0
    assert world.server.store.entry("sql").in_use == 0
    assert world.server.engine.state().generated_tokens < 880
    facts = [record.facts for record in caplog.records if hasattr(record, "facts")]  # type: ignore[attr-defined]
    (line,) = [fact for fact in facts if fact.get("path") == "/v1/chat/completions"]
    assert line["error"] == "client_disconnected"
    assert line["status"] == 499
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def test_15_too_much_for_a_tenant_and_for_the_server(own_folder: Path) -> None:
    options = Options(limits=Limits(in_flight=2, requests_per_minute=6, body_bytes=5000))
    with Running(own_folder, options=options) as world:
        too_large = infer(world, "sql", text="x" * 6000)
        assert error_of(too_large) == (413, INVALID, "request_too_large", None)

        def chunks() -> Iterator[bytes]:
            for _ in range(10):
                yield b"x" * 1000

        with world.client() as client:  # no length announced
            answer = client.post("/v1/chat/completions", content=chunks())
            assert error_of(answer)[2] == "request_too_large"
        with Long(world, "sql", 900) as one, Long(world, "style", 900) as two:
            full = infer(world, "sql")
            assert error_of(full)[:3] == (503, "overloaded_error", "overloaded")
            assert full.headers["retry-after"] == "1"
        assert one.events[-1] == two.events[-1] == "[DONE]"
        codes = [infer(world, BASE, max_tokens=1) for _ in range(6)]
        refused = [answer for answer in codes if answer.status_code != 200]
        assert refused
        assert error_of(refused[0])[:3] == (429, "rate_limit_error", "rate_limit_exceeded")
        assert 1 <= int(refused[0].headers["retry-after"]) <= 10


def test_15_the_engines_queue_is_bounded(own_folder: Path) -> None:
    with (
        Running(own_folder, limits=EngineLimits(running=1, waiting=1)) as world,
        Long(world, "sql", 700),
    ):
        waiting = threading.Thread(target=lambda: infer(world, "style", max_tokens=2))
        waiting.start()
        until(lambda: world.server.engine.state().waiting == 1)
        answer = infer(world, BASE)
        assert error_of(answer)[:3] == (503, "overloaded_error", "overloaded")
        assert answer.headers["retry-after"] == "1"
        waiting.join()


def test_16_an_error_after_the_first_token(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real, steps = world.server.runner.step, 0

    def failing(batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 20:
            raise RuntimeError("a secret of the engine room")
        return real(batch)

    monkeypatch.setattr(world.server.runner, "step", failing)
    with Long(world, BASE) as stream:
        pass
    assert stream.status == 200
    assert stream.events[-1] != "[DONE]"
    error = json.loads(stream.events[-1])["error"]
    assert error["code"] == "internal_error"
    assert "secret" not in stream.events[-1]
    monkeypatch.undo()
    world.ask(BASE)


def test_17_too_long_for_the_context(world: World) -> None:
    wanted = (400, INVALID, "context_length_exceeded")
    assert error_of(infer(world, "sql", max_tokens=1020))[:3] == wanted
    assert error_of(infer(world, "sql", text="x" * 1100))[:3] == wanted
    assert error_of(infer(world, "sql", text="x" * 1100, stream=True))[:3] == wanted
    body = {**chat("sql", "x" * 990), "ignore_eos": True}
    del body["max_tokens"]  # then it is what is left
    usage = world.post("/v1/chat/completions", body).json()["usage"]
    assert usage["total_tokens"] == 1024


def test_18_memory_runs_out_in_a_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(batch: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(world.server.runner, "step", full)
        answer = infer(world, "sql")
    assert error_of(answer)[:3] == (503, "server_error", "out_of_memory")
    assert "retry-after" in answer.headers
    world.ask("sql")


def test_19_one_request_fails_in_sampling_and_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.serve.answer import Answer

    real = Answer.take

    def failing(self: Answer, *arguments: Any) -> bool:
        if self.version is not None and self.version.name == "style":
            raise ZeroDivisionError("a secret")
        return real(self, *arguments)

    alone = world.ask("sql", max_tokens=200)
    monkeypatch.setattr(Answer, "take", failing)
    with Long(world, "sql", 200) as other:
        answer = infer(world, "style")
        assert error_of(answer)[:3] == (500, "server_error", "internal_error")
        assert "secret" not in answer.text
    assert other.text == alone


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_20_the_engine_dies_and_comes_back(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Running(own_folder) as world:
        before = world.ask("sql")
        engine, real, seen = world.server.engine, world.server.restart, threading.Event()

        def broken() -> bool:
            raise RuntimeError("broken")

        def restart() -> None:
            assert seen.wait(20)
            real()

        monkeypatch.setattr(world.server, "restart", restart)
        monkeypatch.setattr(engine, "_cycle", broken)
        until(lambda: not engine.alive)
        for answer in (infer(world, "sql"), infer(world, BASE, stream=True), world.get("/health")):
            assert error_of(answer)[:3] == (503, "server_error", "engine_dead")
            assert "retry-after" in answer.headers
        assert world.get("/health/live").status_code == 200
        assert error_of(world.get("/health/ready"))[0] == 503
        seen.set()
        until(lambda: world.get("/health").status_code == 200)
        assert world.ask("sql") == before
        assert 'lorakit_engine_restarts_total{model_name="tiny"} 1.0' in world.get("/metrics").text


# ---- 21 to 25
def test_21_keys(own_folder: Path) -> None:
    path = own_folder / "keys.json"
    entries = [
        {"key": "key-of-acme", "tenant": "acme", "adapters": ["acme-*", "sql"]},
        {"key": "key-of-others", "tenant": "others", "adapters": ["style"]},
    ]
    path.write_text(json.dumps({"keys": entries}))
    with Running(own_folder, keys=Keys.from_file(path)) as world:
        for headers in ({}, {"Authorization": "Bearer wrong-key"}, {"Authorization": "key-of-acme"}):
            answer = world.post("/v1/chat/completions", chat("sql"), headers=headers)
            assert error_of(answer) == (401, "authentication_error", "invalid_api_key", None)
            assert answer.headers["www-authenticate"] == "Bearer"
        acme, others = ({"Authorization": f"Bearer key-of-{who}"} for who in ("acme", "others"))
        assert world.post("/v1/chat/completions", chat("acme-secret"), headers=acme).status_code == 200
        hidden = world.post("/v1/chat/completions", chat("acme-secret"), headers=others)
        unknown = world.post("/v1/chat/completions", chat("acme-secrex"), headers=others)
        assert error_of(hidden) == error_of(unknown) == (404, "not_found_error", "model_not_found", "model")
        assert hidden.text.replace("acme-secret", "") == unknown.text.replace("acme-secrex", "")
        for model in ("acme-secret@1", "style:0.5+acme-secret:0.5"):
            assert world.post("/v1/chat/completions", chat(model), headers=others).status_code == 404
        listed = [m["id"] for m in world.get("/v1/models", headers=others).json()["data"]]
        assert listed == [BASE, "style"]
        assert [a["id"] for a in world.get("/v1/adapters", headers=others).json()["data"]] == ["style"]
        assert world.get("/v1/adapters/acme-secret", headers=others).status_code == 404
        for answer in (
            world.post("/v1/adapters", {"name": "x", "source": "style"}, headers=others),
            world.get("/metrics", headers=others),
        ):
            assert error_of(answer)[:3] == (403, "permission_error", "permission_denied")
        assert world.get("/health").status_code == 200


def test_22_a_deadline_in_the_queue(own_folder: Path) -> None:
    with (
        Running(own_folder, limits=EngineLimits(running=1)) as world,
        Long(world, "sql", 700),
    ):
        began = time.monotonic()
        answer = infer(world, "style", timeout=0.2)
        assert error_of(answer)[:3] == (504, "timeout_error", "deadline_exceeded")
        assert time.monotonic() - began < 1


# 23, SIGTERM: tests/serve/test_http.py


def test_24_a_reader_that_does_not_read(own_folder: Path) -> None:
    with Running(own_folder, limits=EngineLimits(unread_events=16)) as world:
        # Small buffers of the system, so that a reader who stops is noticed.
        body = {
            **chat("sql", max_tokens=900, ignore_eos=True, n=2, logprobs=True, top_logprobs=20),
            "stream": True,
        }
        raw = json.dumps(body).encode()
        host, port = world.url.removeprefix("http://").split(":")
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw)
        )
        until(lambda: world.server.engine.state().running == 2)
        until(lambda: world.server.engine.state().running == 0, 60)
        assert world.server.engine.state().generated_tokens < 2 * 890
        assert world.server.runner.arena.used == 0
        received = b""
        connection.settimeout(10)
        while piece := connection.recv(65536):
            received += piece
            if received.endswith(b"0\r\n\r\n"):
                break
        connection.close()
        assert b"slow_reader" in received
        assert b"[DONE]" not in received
        world.ask("sql")


def test_25_bytes_of_characters_and_stops_across_tokens(world: World) -> None:
    tokenizer = world.server.tokenizer
    word = "né🙂e!"
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(word)  # several tokens make one character
    choice = {"type": "choice", "choice": [word]}
    body = {**chat(BASE, response_format=choice, max_tokens=40), "stream": True}
    with world.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line and line != "data: [DONE]"]
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(pieces) == word
    assert not any("\ufffd" in piece for piece in pieces)
    stopped = infer(world, BASE, response_format=choice, max_tokens=40, stop=["🙂e"]).json()["choices"][0]
    assert stopped["message"]["content"] == "né"
    assert stopped["finish_reason"] == "stop"
