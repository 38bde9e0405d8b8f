"""The program itself in a process of its own: its first lines, its log, and its end at SIGTERM."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lorakit.errors import ConfigError
from lorakit.serve.http import bind
from tests.serve.http_world import chat, error_of, save_world
from tests.serve.program import Program, end_in_the_middle, stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("program"))


@pytest.fixture
def program(folder: Path, request: pytest.FixtureRequest) -> Iterator[Program]:
    made = Program(folder, "--adapters", folder / "adapters", *getattr(request, "param", ()))
    yield made
    made.process.kill()
    made.process.wait()


def test_first_lines_and_the_log(program: Program) -> None:
    assert program.lines[0].startswith("base      tiny, fp32, ")
    assert program.lines[1].startswith("runs on   ")
    assert program.lines[2].endswith("acme-secret, sql, style")
    answer = httpx.post(f"{program.url}/v1/chat/completions", json=chat("sql", "my secret"), trust_env=False)
    assert answer.status_code == 200
    with pytest.raises(ConfigError, match="cannot listen"):
        bind("127.0.0.1", int(program.url.rsplit(":", 1)[1]))
    program.process.send_signal(signal.SIGINT)
    code, log = program.end()
    assert code == 0
    (line,) = [entry for entry in log if entry["event"] == "request"]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["adapter"] == "sql@1"
    assert line["completion_tokens"] == 12
    assert "my secret" not in json.dumps(log)


@pytest.mark.parametrize("program", [("--log-prompts",)], indirect=True)
def test_23_sigterm_finishes_what_is_in_hand(program: Program) -> None:
    events: list[str] = []
    begun = threading.Event()
    reader = threading.Thread(target=stream, args=(program, 900, events, begun))
    with httpx.Client(trust_env=False) as client:
        assert client.get(f"{program.url}/health/ready").status_code == 200
        reader.start()
        assert begun.wait(20)
        program.process.send_signal(signal.SIGTERM)
        answer = None
        while answer is None or answer.status_code == 200:  # until the signal has arrived
            answer = client.post(f"{program.url}/v1/chat/completions", json=chat("sql", max_tokens=1))
        assert error_of(answer)[:3] == (503, "server_error", "shutting_down")
        assert "retry-after" in answer.headers
        assert error_of(client.get(f"{program.url}/health/ready"))[0] == 503
        assert client.get(f"{program.url}/health/live").status_code == 200
    reader.join(60)
    assert events[-1] == "[DONE]"
    code, log = program.end()
    assert code == 0
    assert any(entry.get("prompt") for entry in log)  # they were asked for


@pytest.mark.parametrize("program", [("--grace", 0.2)], indirect=True)
def test_23_what_outlasts_the_grace_is_told_so(program: Program) -> None:
    end_in_the_middle(program)
