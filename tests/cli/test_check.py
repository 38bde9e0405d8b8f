"""``lorakit check``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Lorakit, Trained


def test_a_recipe_that_would_train(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    outcome = lorakit("check", trained.recipe, "--output", tmp_path / "new")
    assert outcome.code == 0
    assert "training would start" in outcome.out
    assert "answers end in '<|im_end|>'" in outcome.out
    assert not (tmp_path / "new").exists()


def test_mistakes_give_an_exit_code(lorakit: Lorakit, trained: Trained) -> None:
    outcome = lorakit("check", trained.recipe, "--adapter.targets", "[no_such]", "--json")
    assert outcome.code == 2
    found = json.loads(outcome.out)
    assert not found["passed"]
    wrong = [finding["subject"] for finding in found["findings"] if finding["state"] == "wrong"]
    assert wrong == ["adapter"]


def test_warnings_count_where_asked(lorakit: Lorakit, trained: Trained) -> None:
    assert lorakit("check", trained.recipe).code == 0  # its output folder holds a run: a warning
    outcome = lorakit("check", trained.recipe, "--strict")
    assert outcome.code == 2
    assert "Warnings count as mistakes" in outcome.out


def test_a_typo_is_told_before_anything_is_read(lorakit: Lorakit, trained: Trained) -> None:
    outcome = lorakit("check", trained.recipe, "--set", "data.trian=x")
    assert outcome.code == 2
    assert "Did you mean 'train'" in outcome.err
