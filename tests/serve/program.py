"""`lorakit serve` in a process of its own, and a client that is in the middle of an answer when it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx

from tests.serve.http_world import chat


class Program:
    """`lorakit serve` in a child."""

    def __init__(self, folder: Path, *words: object) -> None:
        command = [
            sys.executable,
            "-m",
            "lorakit",
            "serve",
            folder / "tiny",
            "--port",
            0,
            "--threads",
            1,
            *words,
        ]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("serving"):
                break
        assert self.lines, self.process.communicate()[1]
        assert self.lines[-1].startswith("serving"), self.process.communicate()[1]
        self.url = self.lines[-1].split()[1].removesuffix("/v1")

    def end(self) -> tuple[int, list[dict[str, Any]]]:
        """Its code, and its log."""
        _, err = self.process.communicate(timeout=60)
        log = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
        assert "Traceback" not in err
        return self.process.returncode, log


def stream(program: Program, tokens: int, events: list[str], begun: threading.Event) -> None:
    body = {**chat("sql", max_tokens=tokens, ignore_eos=True), "stream": True}
    with (
        httpx.Client(trust_env=False, timeout=60) as client,
        client.stream("POST", f"{program.url}/v1/chat/completions", json=body) as answer,
    ):
        for line in answer.iter_lines():
            if line:
                events.append(line[6:])
                begun.set()


def end_in_the_middle(program: Program) -> None:
    """End a program whose grace is shorter than the answer that it writes: the client must be told."""
    events: list[str] = []
    begun = threading.Event()
    reader = threading.Thread(target=stream, args=(program, 950, events, begun))
    reader.start()
    assert begun.wait(20)
    program.process.send_signal(signal.SIGTERM)
    reader.join(60)
    assert json.loads(events[-1])["error"]["code"] == "shutting_down"
    assert program.end()[0] == 0
