"""``lorakit train``."""

from __future__ import annotations

import json
from pathlib import Path

import lorakit as lk
from tests.cli.conftest import Lorakit, Trained


def test_a_run_from_a_recipe_leaves_a_usable_adapter(trained: Trained) -> None:
    assert lk.read(trained.adapter).numel > 0
    run = json.loads((trained.adapter.parent / "run.json").read_text(encoding="utf-8"))
    assert run["ended"]["how"] == "finished"
    assert run["ended"]["last_loss"] < 1.0


def test_settings_and_output_on_the_command_line(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    outcome = lorakit(
        "train", trained.recipe, "-s", "train.max_steps=2", "--set", "adapter.r=2", "--out", tmp_path / "o"
    )
    assert outcome.code == 0
    assert "step 2/2" in outcome.err
    assert f"lorakit eval {trained.recipe}" in outcome.out
    assert str(tmp_path / "o" / "adapter") in outcome.out
    state = lk.read(tmp_path / "o" / "adapter")
    assert {method.r for method in state.spec.methods.values()} == {2}  # type: ignore[attr-defined]


def test_a_folder_with_a_run_is_kept(lorakit: Lorakit, trained: Trained) -> None:
    outcome = lorakit("train", trained.recipe)
    assert outcome.code == 2
    assert "--resume" in outcome.err
    assert "--overwrite" in outcome.err


def test_resume(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "o"
    short = ["train", trained.recipe, "--out", out, "--set", "train.max_steps=4"]
    assert lorakit(*short, "--set", "train.max_seconds=0.000001").code == 0
    outcome = lorakit(*short, "--resume")
    assert outcome.code == 0
    assert "resuming after step 1 of 4" in outcome.err
    assert "step 4/4" in outcome.err


def test_a_typo_in_the_recipe(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    recipe = tmp_path / "typo.yaml"
    recipe.write_text(
        trained.recipe.read_text(encoding="utf-8").replace("max_steps", "max_step"), encoding="utf-8"
    )
    outcome = lorakit("train", recipe)
    assert outcome.code == 2
    assert (
        "typo.yaml, line 4: 'train.max_step' is not a key of a recipe. Did you mean 'max_steps'"
        in outcome.err
    )
