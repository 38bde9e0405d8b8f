"""Trackers are told what ``metrics.jsonl`` is told."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.errors import MissingDependencyError
from lorakit.train import Recipe, read_metrics, train
from lorakit.train.tracker_packages import check_installed

MakeRecipe = Callable[..., Recipe]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lorakit.train.tracker_packages as module

    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "wandb" else object())
    check_installed(["tensorboard"])
    made = recipe(report_to=["tensorboard", "wandb"])
    with pytest.raises(MissingDependencyError, match=r"names wandb.*pip install wandb"):
        train(made)
    assert not made.output.exists()


def test_tensorboard_has_the_same_numbers(recipe: MakeRecipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = {"train": str(tmp_path / "train.jsonl"), "valid": str(tmp_path / "train.jsonl")}
    settings = {"log_every": 2, "eval_every": 3, "sections": {"data": data}}
    result = train(recipe(report_to=["tensorboard"], **settings))
    events = EventAccumulator(str(result.folder / "tensorboard"))
    events.Reload()
    lines = read_metrics(result.folder / "metrics.jsonl")
    for tag, key in (
        ("train/loss", "loss"),
        ("train/learning_rate", "learning_rate"),
        ("eval/loss", "valid_loss"),
    ):
        told = [(event.step, event.value) for event in events.Scalars(tag)]
        written = [(line["step"], line[key]) for line in lines if key in line]
        assert [step for step, _ in told] == [step for step, _ in written]
        assert [value for _, value in told] == pytest.approx([value for _, value in written], rel=1e-6)
    assert result.losses == train(recipe("without", **settings)).losses


def test_trackio_has_the_run(recipe: MakeRecipe, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    made = recipe(report_to=["trackio"], log_every=2)
    (tmp_path / "plan.json").write_text(json.dumps(made.plain()), encoding="utf-8")
    script = """
        import json, sys
        from lorakit.train import Recipe, train
        train(Recipe.from_mapping(json.load(open(sys.argv[1]))))
    """
    # Where it keeps its files is decided when it is imported.
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "plan.json")],
        check=True,
        env=environment,
        capture_output=True,
    )
    (database,) = (tmp_path / "trackio").glob("*.db")
    assert database.stem == "lorakit"
    with sqlite3.connect(database) as base:
        told = [json.loads(row[0]) for row in base.execute("select metrics from metrics")]
    losses = [line["train/loss"] for line in told if "train/loss" in line]
    lines = read_metrics(made.output / "metrics.jsonl")
    assert losses == pytest.approx([line["loss"] for line in lines])


TWO_RUNS = """
    import json, sys
    from lorakit.train import Recipe, train
    for number in ("0", "1"):
        plan = json.load(open(sys.argv[1]))
        plan["train"]["seed"] = int(number)
        plan["output"] += number
        train(Recipe.from_mapping(plan))
"""


def two_runs(
    recipe: MakeRecipe, tmp_path: Path, tracker: str, **environment: str
) -> list[list[dict[str, object]]]:
    """Train twice in one process, and return the lines of both runs' ``metrics.jsonl``."""
    made = recipe(report_to=[tracker], log_every=2)
    (tmp_path / "plan.json").write_text(json.dumps(made.plain()), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TWO_RUNS), str(tmp_path / "plan.json")],
        check=True,
        env={**os.environ, **environment},
        capture_output=True,
    )
    return [read_metrics(Path(f"{made.output}{number}") / "metrics.jsonl") for number in "01"]


@pytest.mark.slow
def test_each_run_is_a_run_of_its_own_in_wandb(recipe: MakeRecipe, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    lines = two_runs(recipe, tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 2
    for file, own, other in zip(files, lines, reversed(lines), strict=True):
        told = file.read_bytes()
        assert b"train/loss" in told
        assert all(repr(line["loss"]).encode() in told for line in own)
        assert not any(repr(line["loss"]).encode() in told for line in other)


@pytest.mark.slow
def test_each_run_is_a_run_of_its_own_in_mlflow(recipe: MakeRecipe, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    lines = two_runs(recipe, tmp_path, "mlflow", MLFLOW_TRACKING_URI=store)
    client = mlflow.MlflowClient(store)
    runs = client.search_runs(["0"], order_by=["start_time"])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    for run, own in zip(runs, lines, strict=True):
        told = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")]
        assert told == [(line["step"], pytest.approx(line["loss"])) for line in own if "loss" in line]
