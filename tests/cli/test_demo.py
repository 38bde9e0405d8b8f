"""``lorakit demo`` hands its options on and prints what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.study import demo
from tests.cli.conftest import Lorakit

RESULT = demo.DemoResult(
    model="m", examples=1, questions=2, accuracy_before=0.0, accuracy_after=0.5, trainable=3, base_parameters=4,
    adapter_bytes=5, merge_difference=0.0, largest_logit=1.0, unmerged_exactly=True, reloaded_equal=2, reloaded=2,
    train_seconds=1.0, tokens_per_second=2.0, seconds=3.0, adapter="a", recipe="r", plot="p.png",
    samples=(("question", "before", "after", "gold"),),
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    given: dict[str, Any] = {}

    def run(out: Path, **options: Any) -> demo.DemoResult:
        given.update(options, out=out)
        return RESULT

    monkeypatch.setattr(demo, "run", run)
    return given


def test_usual_quick_and_own_sizes(lorakit: Lorakit, asked: dict[str, Any], tmp_path: Path) -> None:
    assert lorakit("demo").code == 0
    assert (asked["examples"], asked["questions"], asked["seed"]) == (demo.EXAMPLES, demo.QUESTIONS, 0)
    lorakit("demo", "--quick")
    assert asked["examples"] < demo.EXAMPLES
    lorakit(
        "demo", "--quick", "--examples", 7, "--questions", 9, "--seed", 3, "--out", tmp_path, "--model", "x"
    )
    assert {**asked, "progress": None} == {
        "out": tmp_path, "model": "x", "examples": 7, "questions": 9, "seed": 3, "progress": None,
    }  # fmt: skip


def test_table_samples_and_json(lorakit: Lorakit, asked: dict[str, Any]) -> None:
    shown = lorakit("demo").out
    for word in ("question", "before", "after", "gold", "trainable parameters", "p.png"):
        assert word in shown
    assert json.loads(lorakit("demo", "--json").out)["accuracy_after"] == 0.5


def test_an_unsound_result_fails(
    lorakit: Lorakit, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.DemoResult, "sound", property(lambda self: False))
    assert lorakit("demo").code == 1
    assert lorakit("demo", "--quick").code == 0
