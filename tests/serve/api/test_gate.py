"""What every request passes: slow bodies, the page that needs no key, and the log's line."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path

import pytest

from lorakit.serve.api.auth import Keys, Tenant
from lorakit.serve.api.limits import Limits
from lorakit.serve.api.record import JsonLines, RequestRecord, request_id
from lorakit.serve.api.service import Options
from tests.serve.http_world import Running, chat, error_of


def test_a_body_that_does_not_come(own_folder: Path) -> None:
    options = Options(limits=Limits(body_seconds=0.3))
    with Running(own_folder, options=options) as world:
        host, port = world.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"
            )
            answer = b"".join(iter(lambda: connection.recv(65536), b""))  # whole: the server closes then
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "invalid_request"
        assert world.service.admission.held_bytes == 0
        world.idle()
        world.ask("sql")


def test_the_page_needs_no_key_and_everything_else_does(own_folder: Path) -> None:
    keys = Keys([(b"0" * 32, Tenant("t"))])
    with Running(own_folder, keys=keys) as world:
        assert world.get("/").text.startswith("<!doctype html>")
        assert world.get("/").headers["x-content-type-options"] == "nosniff"
        assert world.get("/page.css").headers["content-type"].startswith("text/css")
        for path in ("/v1/models", "/v1/state", "/metrics", "/none.css", "/page/../../keys.json"):
            assert error_of(world.get(path))[0] == 401
        assert world.get("/openapi.json").json()["info"]["title"] == "lorakit"


def test_request_ids() -> None:
    assert request_id("a-b_c:1") == "a-b_c:1"
    for strange in (None, "", "a b", "a\n", "x" * 129, "ü"):
        assert request_id(strange).startswith("req-")


def test_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    record = RequestRecord("r1", "POST", "/generate", tenant=Tenant("t"), status=200, digest="a" * 64)
    with caplog.at_level(logging.INFO, logger="lorakit.serve"):
        record.write()
    line = json.loads(JsonLines().format(caplog.records[-1]))
    assert line.pop("duration_ms") >= 0
    assert line.pop("time")
    assert line == {
        "level": "info",
        "event": "request",
        "request_id": "r1",
        "method": "POST",
        "path": "/generate",
        "status": 200,
        "tenant": "t",
        "digest": "a" * 12,
    }


def test_a_traceback_is_one_line_of_the_log_and_nothing_of_the_answer(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Running(own_folder) as world:

        def broken(*arguments: object) -> None:
            raise RuntimeError("a secret")

        monkeypatch.setattr(world.service, "wanted", broken)
        answer = world.post("/v1/chat/completions", chat("sql"))
        assert error_of(answer)[::2] == (500, "internal_error")
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    lines = [JsonLines().format(record) for record in caplog.records if record.name == "lorakit.serve"]
    (line,) = [line for line in lines if "secret" in line]
    assert "\n" not in line
    assert "RuntimeError" in json.loads(line)["traceback"]
