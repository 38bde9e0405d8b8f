"""``lorakit resume``."""

from __future__ import annotations

import json
from pathlib import Path

from lorakit.train import read_metrics
from tests.cli.conftest import Lorakit, Trained


def _stopped(lorakit: Lorakit, trained: Trained, out: Path) -> None:
    outcome = lorakit(
        "train", trained.recipe, "--out", out, "--train.max_steps", 4, "--train.max_seconds", "0.000001",
        "--train.log_every", 1,
    )  # fmt: skip
    assert outcome.code == 0
    assert f"lorakit resume {out}" in outcome.out


def test_a_run_goes_on_from_its_own_record(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    _stopped(lorakit, trained, tmp_path / "o")
    outcome = lorakit("resume", tmp_path / "o", "--set", "train.max_seconds=null")
    assert outcome.code == 0
    assert "resuming after step 1 of 4" in outcome.err
    assert [line["step"] for line in read_metrics(tmp_path / "o" / "metrics.jsonl")] == [1, 2, 3, 4]
    run = json.loads((tmp_path / "o" / "run.json").read_text(encoding="utf-8"))
    assert run["ended"]["how"] == "finished"


def test_a_folder_that_was_moved_is_resumed_where_it_is(
    lorakit: Lorakit, trained: Trained, tmp_path: Path
) -> None:
    _stopped(lorakit, trained, tmp_path / "o")
    (tmp_path / "o").rename(tmp_path / "moved")
    assert lorakit("resume", tmp_path / "moved", "-s", "train.max_seconds=null").code == 0
    assert (tmp_path / "moved" / "adapter").is_dir()
    assert not (tmp_path / "o").exists()


def test_what_would_make_it_another_run_is_refused(
    lorakit: Lorakit, trained: Trained, tmp_path: Path
) -> None:
    _stopped(lorakit, trained, tmp_path / "o")
    outcome = lorakit("resume", tmp_path / "o", "--set", "train.lr=1")
    assert outcome.code == 2
    assert "train.lr changed" in outcome.err


def test_a_folder_without_a_run(lorakit: Lorakit, tmp_path: Path) -> None:
    outcome = lorakit("resume", tmp_path)
    assert outcome.code == 2
    assert "holds no run" in outcome.err
