"""``lorakit estimate``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Lorakit, Trained


def test_the_rows_and_the_largest_batch_are_counted(
    lorakit: Lorakit, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = lorakit("estimate", trained.recipe, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    run = json.loads((trained.adapter.parent / "run.json").read_text(encoding="utf-8"))
    assert found["trainable"] == run["trainable"]
    assert found["base_parameters"] == run["base_parameters"]
    assert found["batch"]["steps"] == run["steps"]
    assert found["batch"]["tokens"] == run["ended"]["tokens"]
    assert found["largest"][0][1] == max(size for _, size in found["largest"])
    assert 0 < found["at_least_seconds"] < 60
    words = lorakit("estimate", trained.recipe)
    assert "at least 0:0" in words.out
    assert "train.activation_checkpointing" in words.out


def test_flags_change_the_answer(lorakit: Lorakit, trained: Trained) -> None:
    def trainable(*flags: object) -> int:
        return int(json.loads(lorakit("estimate", trained.recipe, "--json", *flags).out)["trainable"])

    assert trainable("--adapter.r", 16) == 2 * trainable()


def test_nothing_is_fetched(lorakit: Lorakit, trained: Trained) -> None:
    outcome = lorakit("estimate", trained.recipe, "--model.name", "llama-3-8b", "--model.device", "cuda")
    assert outcome.code == 0, outcome.err
    assert "8,030,261,248 parameters" in outcome.out
    assert "Not known: the rows" in outcome.out
    outcome = lorakit("estimate", trained.recipe, "--model.name", "nobody/never-there")
    assert outcome.code == 2
    assert "not on this machine" in outcome.err
