"""Comparing settings: each is run once, told with what it cost, and a failure does not stop the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError
from lorakit.study.comparison import Outcome, Setting, compare, markdown, read_outcome
from lorakit.train import Silent
from tests.tiny_chat import write_rows
from tests.tiny_encoder import kind_rows, save_tiny_encoder

HEAD = Setting("head alone", {"method": "full", "targets": ["classifier"]}, {"lr": 1e-2})
LORA = Setting("LoRA", {"r": 2}, {"lr": 1e-2})
PLUS = Setting("LoRA+", {"r": 2}, {"lr": 1e-2, "lora_plus_ratio": 16.0})
DYLORA = Setting("DyLoRA", {"method": "dylora", "r": 4}, {"lr": 1e-2}, ranks=(1, 4))
ADALORA = Setting("AdaLoRA", {"method": "adalora", "init_r": 3, "target_r": 1}, {"lr": 1e-2})


class Listening(Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def say(self, line: str) -> None:
        self.heard.append(line)

    @property
    def ran(self) -> list[str]:
        return [line.removeprefix("---- ") for line in self.heard if line.startswith("---- ")]


@pytest.fixture
def common(tmp_path: Path) -> dict[str, Any]:
    model = save_tiny_encoder(tmp_path / "model")
    rows = str(write_rows(tmp_path / "rows.jsonl", kind_rows(27)))
    return {
        "task": "classification",
        "model": {"name": str(model)},
        "data": {"train": rows, "valid": rows, "test": rows},
        "train": {"max_steps": 10, "batch_rows": 9},
    }


def test_every_setting_is_run_and_measured(common: dict[str, Any], tmp_path: Path) -> None:
    outcomes, failed = compare(
        [HEAD, LORA, DYLORA, ADALORA], common, tmp_path / "out", splits=("valid", "test")
    )
    assert not failed
    head, lora, dylora, adalora = outcomes
    assert [o.name for o in outcomes] == ["head alone", "LoRA", "DyLoRA", "AdaLoRA"]
    assert all(o.count == 54 and o.steps == 10 and o.seconds > 0 for o in outcomes)
    assert head.trainable == 99
    assert lora.trainable == 99 + 2 * (2 * (4 * 64 + 2 * 80)) + 2 * 64
    assert lora.adapter_bytes > 4 * lora.trainable > 4 * head.trainable
    assert head.base_bytes == lora.base_bytes > 0
    assert sorted(dylora.cut) == ["1", "4"]
    assert dylora.cut["4"] == dylora.correct  # its full rank is what was trained
    assert adalora.note == "13 of 39 singular values kept at 13 targets"  # the budget: one at each
    assert not (tmp_path / "out" / "dylora" / "rank-1").exists()
    table = markdown(outcomes)
    assert "| LoRA | " in table
    assert "| DyLoRA, cut to rank 1 | " in table
    assert "- AdaLoRA: 13 of 39" in table
    assert "54 rows scored" in table


def test_what_is_there_is_not_run_again_unless_its_recipe_changed(
    common: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = Listening()
    (head,), _ = compare([HEAD], common, out, progress=first)
    assert first.ran == ["head alone"]
    second = Listening()
    outcomes, _ = compare([HEAD, PLUS, LORA], common, out, progress=second)
    assert second.ran == ["LoRA+", "LoRA"]
    assert outcomes[0] == head
    assert {path.name for path in out.glob("*.json")} == {"head-alone.json", "lora-plus.json", "lora.json"}
    third = Listening()
    compare([HEAD, LORA], {**common, "train": {"max_steps": 2, "batch_rows": 9}}, out, progress=third)
    assert third.ran == ["head alone", "LoRA"]


def test_the_recipe_in_a_result_repeats_it(common: dict[str, Any], tmp_path: Path) -> None:
    from lorakit.train import Recipe, train

    (outcome,), _ = compare([LORA], common, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "lora.json").read_text(encoding="utf-8"))
    again = train(Recipe.from_mapping({**stored["recipe"], "output": str(tmp_path / "again")}))
    assert again.losses[-1] == outcome.loss


def test_a_failure_is_told_and_the_others_go_on(common: dict[str, Any], tmp_path: Path) -> None:
    wrong = Setting("wrong", {"method": "lorra"})
    outcomes, failed = compare([wrong, HEAD], common, tmp_path / "out")
    assert [o.name for o in outcomes] == ["head alone"]
    assert "Did you mean 'lora'" in failed["wrong"]
    assert not (tmp_path / "out" / "wrong.json").exists()


def test_two_settings_of_one_name(common: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Two settings are called 'lora'"):
        compare([LORA, Setting("lora", {})], common, tmp_path)


def outcome(**changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "name": "LoRA", "correct": 75, "count": 100, "macro_f1": 0.7, "trainable": 1234, "seconds": 30.4, "steps": 9,
        "loss": 0.5, "adapter_bytes": 1_500_000, "base_bytes": 90_000_000, "cut": {}, "note": "", "recipe": {},
        "machine": {"processor": "a CPU", "threads": 2}, "versions": {"torch": "2"}, **changes,
    }  # fmt: skip
    return Outcome(**values)


def test_the_table() -> None:
    text = markdown([outcome(), outcome(name="DyLoRA", cut={"1": 50})])
    assert "| LoRA | 75.0 % ± 4.3 | 1,234 | 30 | 1.50 | 90.0 |" in text
    assert "| DyLoRA, cut to rank 1 | 50.0 % |" in text
    assert text.rstrip().endswith("100 rows scored. a CPU, 2 torch threads; torch 2.")


def test_a_result_of_another_recipe_is_none(tmp_path: Path) -> None:
    assert read_outcome(tmp_path / "none.json", {}) is None
    path = tmp_path / "x.json"
    from dataclasses import asdict

    path.write_text(json.dumps(asdict(outcome(recipe={"a": [1]}))), encoding="utf-8")
    assert read_outcome(path, {"a": (1,)}) == outcome(recipe={"a": [1]})
    assert read_outcome(path, {"a": [2]}) is None
