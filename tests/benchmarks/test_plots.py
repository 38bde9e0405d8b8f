"""The pictures of the training benchmarks are drawn from what was recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import plots
from benchmarks.harness import LORAKIT, PEFT, Measurement

PNG = b"\x89PNG"


def record(folder: Path, name: str, measurements: list[Measurement], quick: bool = False) -> None:
    told = {"quick": quick, "measurements": [measurement.to_json() for measurement in measurements]}
    (folder / f"{name}.json").write_text(json.dumps(told))


def test_each_record_has_its_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    both = {LORAKIT: [1.0, 2.0, 3.0], PEFT: [3.0, 4.0, 7.0]}
    record(tmp_path, "train_throughput", [Measurement(f"set {i}", "MB", both) for i in range(4)])
    sides = {"with": [1.0, 1.1], "without": [2.0, 2.3]}
    found = [Measurement(f"a trick: {what}", "s", sides, ("without", "with")) for what in ("time", "memory")]
    record(tmp_path, "train_ablation", found)
    plots.main(["--results", str(tmp_path), "--images", str(tmp_path / "images")])
    for name in ("train-throughput", "train-ablation"):
        assert (tmp_path / "images" / f"{name}.png").read_bytes().startswith(PNG)


def test_a_quick_run_is_not_drawn(tmp_path: Path) -> None:
    record(tmp_path, "train_ablation", [], quick=True)
    with pytest.raises(SystemExit, match="measures nothing"):
        plots.main(["--results", str(tmp_path), "--images", str(tmp_path)])


def test_nothing_recorded_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run them with --json first"):
        plots.main(["--results", str(tmp_path), "--images", str(tmp_path)])
