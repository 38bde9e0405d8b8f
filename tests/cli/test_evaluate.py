"""``lorakit eval``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Lorakit, Trained


def test_the_recipes_own_adapter_against_the_base(lorakit: Lorakit, trained: Trained) -> None:
    adapted = json.loads(lorakit("eval", trained.recipe, "--json").out)
    base = json.loads(lorakit("eval", trained.recipe, "--base", "--json").out)
    assert adapted["adapter"] == str(trained.adapter)
    assert base["adapter"] is None
    assert adapted["scores"]["exact_match"] > 0.5 > base["scores"]["exact_match"]
    assert adapted["scores"]["loss"] < base["scores"]["loss"]
    assert adapted["count"] == 12


def test_table_limit_and_saved_answers(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    outcome = lorakit(
        "eval", trained.recipe, "--limit", 3, "--split", "train", "--save", tmp_path / "a.jsonl"
    )
    assert outcome.code == 0
    assert "3 examples of the train split" in outcome.out
    assert "exact_match" in outcome.out
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["references"] for line in lines] == [["red"], ["green"], ["blue"]]


def test_mistakes(lorakit: Lorakit, trained: Trained) -> None:
    assert "give --base or --adapter" in lorakit("eval", trained.recipe, "--base", "--adapter", "x").err
    assert "There is no adapter at" in lorakit("eval", trained.recipe, "--set", "output=nowhere").err
    assert lorakit("eval", trained.recipe, "--split", "tets").code == 2
    assert "set data.valid" in lorakit("eval", trained.recipe, "--split", "valid").err


def test_every_key_is_a_flag(lorakit: Lorakit, trained: Trained) -> None:
    outcome = lorakit(
        "eval", trained.recipe, "--evaluate.metrics", "[exact_match]", "--evaluate.limit", 2, "--json"
    )
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)
    assert (list(told["scores"]), told["count"]) == (["exact_match"], 2)
