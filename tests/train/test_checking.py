"""Checks: a good recipe passes and then trains; every kind of mistake is found, and several at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.train import Recipe, train
from lorakit.train.checking import CheckReport, check
from tests.tiny_chat import write_rows
from tests.tiny_encoder import save_tiny_encoder

MakeRecipe = Callable[..., Recipe]


def found(report: CheckReport) -> dict[str, str]:
    return {finding.subject: finding.state for finding in report.findings}


def text(report: CheckReport, subject: str) -> str:
    return next(finding.text for finding in report.findings if finding.subject == subject)


def test_what_passes_trains(recipe: MakeRecipe) -> None:
    report = check(recipe())
    assert report.passed
    assert not report.count("skipped")
    assert found(report)["adapter"] == "ok"
    assert "ran on the meta device" in text(report, "adapter")
    result = train(recipe(max_steps=1))
    assert f"{result.report.trainable:,} parameters to train" in text(report, "adapter")
    assert found(check(recipe())) == {**found(report), "output": "warning"}


def test_several_mistakes_are_found_at_once(recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    bad = recipe(
        sections={
            "data": {"train": str(rows), "test": str(tmp_path / "nothing.jsonl")},
            "adapter": {"targets": ["no_such_layer"]},
        }
    )
    report = check(bad)
    assert not report.passed
    states = found(report)
    assert states["train split"] == states["test split"] == states["adapter"] == "wrong"
    assert "r.jsonl, line 2: 'completion' is missing" in text(report, "train split")
    assert "no_such_layer" in text(report, "adapter")


def test_a_template_that_does_not_only_append(recipe: MakeRecipe, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8"
    )
    made = recipe()
    made.model.chat_template = template
    report = check(made)
    assert found(report)["chat template"] == "wrong"
    assert found(report)["train split"] == "wrong"
    template.write_text("{% if %}", encoding="utf-8")
    assert "The chat template, line 1" in text(check(made), "chat template")


def test_long_rows_are_warned_about_and_rows_beyond_the_model_refused(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    report = check(recipe(max_length=30))
    assert report.passed
    assert found(report)["train lengths"] == "warning"
    assert "left out" in text(report, "train lengths")
    rows = write_rows(tmp_path / "r.jsonl", [{"prompt": "a" * 1100, "completion": "b"}])
    report = check(recipe(max_length=2000, sections={"data": {"train": str(rows)}}))
    assert found(report)["lengths"] == "wrong"


def test_repeats_and_leaks(recipe: MakeRecipe, tmp_path: Path) -> None:
    one, two = {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}
    learnt, held = write_rows(tmp_path / "t.jsonl", [one, one, two]), write_rows(tmp_path / "v.jsonl", [two])
    report = check(recipe(sections={"data": {"train": str(learnt), "valid": str(held)}}))
    assert report.passed
    assert text(report, "repeats").startswith("1 rows")
    assert "1 of 1 rows of the valid split are trained on too, the first of them v.jsonl:1" in text(
        report, "leaks"
    )


def test_a_model_that_is_not_there(recipe: MakeRecipe, tmp_path: Path) -> None:
    report = check(recipe(sections={"model": str(tmp_path / "nowhere")}))
    assert not report.passed
    assert found(report)["tokenizer"] == "wrong"
    assert found(report)["data"] == "skipped"


def test_an_output_that_is_a_file(recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("", encoding="utf-8")
    assert found(check(recipe()))["output"] == "wrong"


def test_nothing_to_train_on(recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "r.jsonl", [{"prompt": "a", "completion": "b"}])
    report = check(recipe(sections={"data": {"test": str(rows)}}))
    assert "set data.train" in text(report, "train split")


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("dpo", {"prompt": "q", "chosen": "good", "rejected": "bad"}),
        ("classification", {"text": "the cat", "label": "{i}"}),
        ("regression", {"text": "the cat", "label": 0.5}),
    ],
)
def test_other_tasks(recipe: MakeRecipe, tmp_path: Path, task: str, row: dict[str, Any]) -> None:
    rows = [{k: v.format(i=i) if isinstance(v, str) else v for k, v in row.items()} for i in range(3)]
    sections: dict[str, Any] = {"task": task, "data": {"train": str(write_rows(tmp_path / "r.jsonl", rows))}}
    if task != "dpo":
        sections["model"] = str(save_tiny_encoder(tmp_path / "encoder"))
    report = check(recipe(sections=sections))
    assert report.passed, report.findings
    assert not report.count("skipped")
