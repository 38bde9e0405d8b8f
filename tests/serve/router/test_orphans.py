"""Replicas end with their router, however it ends; and one that cannot start stops the whole."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest

from lorakit.cli.app import run
from tests.serve.http_world import save_world, until
from tests.serve.program import Program, end_in_the_middle

pytestmark = pytest.mark.slow


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_replicas_do_not_outlive_a_killed_router(tmp_path: Path) -> None:
    program = Program(save_world(tmp_path), "--replicas", 2, "--runner", "transformers")
    state = httpx.get(f"{program.url}/v1/state", trust_env=False).json()
    pids = [replica["pid"] for replica in state["replicas"]]
    program.process.send_signal(signal.SIGKILL)
    program.process.communicate()
    until(lambda: all(gone(pid) for pid in pids), 30)


def test_a_base_that_cannot_be_served(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["serve", str(tmp_path / "nope"), "--port", "0", "--replicas", "2"]) == 2
    told = capfd.readouterr().err
    assert "ended with code 2 before it took requests" in told
    assert "no base model" in told, "the replica says why"


def test_what_outlasts_the_grace_is_told_so(tmp_path: Path) -> None:
    program = Program(save_world(tmp_path), "--replicas", 2, "--grace", 0.2, "-a", tmp_path / "adapters")
    end_in_the_middle(program)
