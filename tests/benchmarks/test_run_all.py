"""Every benchmark runs, and compares what is equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import NAMES, STUDIES

ROOT = Path(__file__).parents[2]


def test_every_file_is_run() -> None:
    others = {"__init__", "harness", "machine", "subjects", "table", "plots", "run_all"}
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - others == {*NAMES, *STUDIES}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "out.json"
    subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(out)], cwd=ROOT, check=True
    )
    told = json.loads(out.read_text())
    assert told["quick"] is True
    assert told["measurements"]
    for measurement in told["measurements"]:
        assert "lorakit" in measurement["sides"]
        assert len(measurement["sides"]) > 1
