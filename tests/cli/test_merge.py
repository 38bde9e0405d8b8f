"""``lorakit merge``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Lorakit, Trained
from tests.tiny_chat import colour_rows


def test_a_merged_model_answers_without_its_adapter(
    lorakit: Lorakit, trained: Trained, tmp_path: Path
) -> None:
    outcome = lorakit("merge", trained.model, trained.adapter, "--out", tmp_path / "merged")
    assert outcome.code == 0
    assert "largest difference of a logit" in outcome.out
    answer = lorakit("generate", tmp_path / "merged", "-p", colour_rows(1)[0]["prompt"], "-n", 8)
    assert answer.out == "red\n"


def test_json_and_weights(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    outcome = lorakit("merge", trained.model, trained.adapter, "-o", tmp_path / "m", "-w", 0.5, "--json")
    result = json.loads(outcome.out)
    assert result["folder"] == str(tmp_path / "m")
    assert result["saved_difference"] < 1e-3 * result["largest_logit"]


def test_mistakes(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    assert "--overwrite" in lorakit("merge", trained.model, trained.adapter, "--out", trained.model).err
    assert (
        "2 weights"
        in lorakit("merge", trained.model, trained.adapter, "-o", tmp_path / "m", "-w", 1, "-w", 2).err
    )
    assert "There is no adapter" in lorakit("merge", trained.model, tmp_path / "x", "-o", tmp_path / "m").err
    assert not (tmp_path / "m").exists()
