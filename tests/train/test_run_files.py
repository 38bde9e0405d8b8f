"""The files that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.errors import ConfigError, TrainingError
from lorakit.train.render import Rendered
from lorakit.train.run_files import (
    MetricsFile,
    checkpoint_to_resume,
    checkpoints,
    machine,
    plot_loss,
    read_metrics,
    read_run,
    rows_hash,
    versions,
    what_changed,
    write_json,
)


def test_json_is_replaced_in_one_piece(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_damaged_record(tmp_path: Path) -> None:
    assert read_run(tmp_path) is None
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="is damaged"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="not the record"):
        read_run(tmp_path)


def test_metrics_keep_what_came_before_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (1, 2, 3):
        file.add({"step": step})
    with path.open("a", encoding="utf-8") as cut:
        cut.write('{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    MetricsFile(path, keep_steps=2).add({"step": 9})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 9]
    MetricsFile(path)
    assert read_metrics(path) == []


def test_checkpoints_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "checkpoint-11"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-11":
            (tmp_path / name / "trainer_state.json").write_text("{}", encoding="utf-8")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_what_may_change_for_a_resume_and_what_not(tmp_path: Path) -> None:
    recipe = {"train": {"lr": 1, "max_seconds": None}, "generate": {"a": 1}, "output": "x"}
    with pytest.raises(TrainingError, match="nothing to resume"):
        checkpoint_to_resume(tmp_path, recipe, "hash")
    write_json(tmp_path / "run.json", {"recipe": recipe, "data_hash": "hash"})
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}", encoding="utf-8")
    other = {"train": {"lr": 1, "max_seconds": 9}, "generate": {"a": 2}, "output": "y"}
    assert checkpoint_to_resume(tmp_path, other, "hash").name == "checkpoint-3"
    with pytest.raises(ConfigError, match=r"train\.lr changed"):
        checkpoint_to_resume(tmp_path, {**recipe, "train": {"lr": 2, "max_seconds": None}}, "hash")
    with pytest.raises(ConfigError, match="training data"):
        checkpoint_to_resume(tmp_path, recipe, "other")


def test_hash_depends_on_rows_and_their_order() -> None:
    a, b = Rendered("a", (1, 2), (-100, 2)), Rendered("b", (1, 2), (-100, -100))
    assert rows_hash([a, b]) == rows_hash([a, b]) != rows_hash([b, a])
    assert rows_hash([a]) == rows_hash([Rendered("other name", (1, 2), (-100, 2))])


def test_picture_of_the_loss(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = [{"step": 1, "loss": 2.0}, {"step": 1, "valid_loss": 2.5}, {"step": 2, "loss": 1.0}]
    path = plot_loss(lines, tmp_path / "loss.png")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plot_loss([], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lorakit.train.run_files as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert plot_loss([{"step": 1, "loss": 2.0}], tmp_path / "loss.png") is None


def test_versions_and_machine_are_plain() -> None:
    import torch

    import lorakit

    found = versions()
    assert found["torch"] == torch.__version__
    assert found["lorakit"] == lorakit.__version__
    assert json.loads(json.dumps(machine()))["threads"] == torch.get_num_threads()


def test_what_changed_since_a_run_was_started() -> None:
    run = {"versions": versions(), "machine": machine()}
    assert what_changed(run) == []
    assert what_changed({}) == []
    run["machine"] = {**run["machine"], "kernels": "nowhere"}
    run["versions"] = {**run["versions"], "torch": "1.7"}
    first, second = what_changed(run)
    assert first.startswith("torch was 1.7, is 2.")
    assert second.startswith("kernels was nowhere, is ")
