"""The best measurement, and patience."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.train import Recipe, read_metrics, train
from lorakit.train.best import Best, best_of, smaller_is_better
from lorakit.train.recipe import TrainSection
from lorakit.train.tasks.causal_lm import CausalLm
from tests.tiny_chat import colour_rows, write_rows

MakeRecipe = Callable[..., Recipe]


def run_through(best: Best, values: list[float]) -> list[bool]:
    return [best.seen(step, {best.metric: value}) for step, value in enumerate(values, 1)]


def test_a_loss_falls_and_a_score_rises() -> None:
    loss, score = Best("valid_loss"), Best("valid_accuracy")
    assert run_through(loss, [3.0, 2.0, 2.0, 2.5, 1.0]) == [True, True, False, False, True]
    assert run_through(score, [0.3, 0.2, 0.3, 0.4]) == [True, False, False, True]
    assert (loss.value, loss.step) == (1.0, 5)
    assert smaller_is_better("perplexity")
    assert not smaller_is_better("valid_spearman")


def test_nan_is_never_the_best() -> None:
    best = Best("valid_loss", patience=2)
    assert run_through(best, [math.nan, 2.0, math.nan, math.nan]) == [False, True, False, False]
    assert best.is_over


def test_patience_counts_what_improves_by_too_little() -> None:
    best = Best("valid_loss", patience=2, min_improvement=0.5)
    # 2.8 and 2.7 are the best ones in their turn, and not by enough; 2.4 is, measured from 3.0.
    assert run_through(best, [3.0, 2.8]) == [True, True]
    assert not best.is_over
    assert best.seen(3, {"valid_loss": 2.4})
    assert best.waited == 0
    run_through(best, [2.3, 2.2])
    assert best.is_over


def test_the_state_goes_on_where_it_was() -> None:
    values = [3.0, 2.0, 2.5, 1.9, 2.0, 2.1]
    for cut in range(len(values)):
        whole, first = Best("valid_loss", 2, 0.2), Best("valid_loss", 2, 0.2)
        run_through(first, values[:cut])
        second = Best("valid_loss", 2, 0.2)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        run_through(whole, values)
        run_through(second, values[cut:])
        assert (whole.value, whole.waited, whole.reference) == (second.value, second.waited, second.reference)


def test_what_a_recipe_asks_for() -> None:
    measures = ("valid_loss", "valid_accuracy")
    assert best_of(TrainSection(), measures, has_valid=True) is None
    assert best_of(TrainSection(eval_every=5), measures, has_valid=False) is None
    assert best_of(TrainSection(eval_every=5, keep_best="none"), measures, has_valid=True) is None
    found = best_of(TrainSection(eval_every=5, patience=3), measures, has_valid=True)
    assert found is not None
    assert (found.metric, found.patience) == ("valid_loss", 3)
    with pytest.raises(ConfigError, match="Did you mean 'valid_accuracy'"):
        best_of(TrainSection(eval_every=5, keep_best="valid_acuracy"), measures, has_valid=True)


@pytest.fixture
def watched(recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    """Recipes with a valid split of other rows, which are learnt at first and forgotten later."""
    write_rows(tmp_path / "train.jsonl", colour_rows(24))
    write_rows(tmp_path / "valid.jsonl", colour_rows(30)[24:])
    data = {"train": str(tmp_path / "train.jsonl"), "valid": str(tmp_path / "valid.jsonl")}

    def make(output: str = "run", **train: Any) -> Recipe:
        return recipe(output, sections={"data": data}, **{"eval_every": 2, "log_every": 2, **train})

    return make


def made_worse_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The valid loss is as measured up to a step, and rises after it."""
    true = CausalLm.measure
    calls = []

    def measure(self: CausalLm, model: Any, rows: Any, collator: Any) -> Mapping[str, float]:
        calls.append(1)
        values = true(self, model, rows, collator)
        return {"valid_loss": values["valid_loss"] + (100.0 * len(calls) if 2 * len(calls) > step else 0.0)}

    monkeypatch.setattr(CausalLm, "measure", measure)


def test_best_and_last_are_kept(watched: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    made_worse_after(monkeypatch, 4)
    result = train(watched(max_steps=8))
    assert result.best is not None
    assert result.best["step"] == 4
    folder = result.folder
    assert json.loads((folder / "best.json").read_text(encoding="utf-8")) == result.best
    # The kept adapter is that of step 4 of the same run, schedule included.
    monkeypatch.undo()
    four = train(watched("four", max_steps=8, save_every=4, keep_checkpoints=9))
    best, there = lk.read(folder / "best"), lk.read(four.folder / "checkpoint-4")
    last = lk.read(result.adapter)
    for path, group in best.tensors.items():
        for name, tensor in group.items():
            assert torch.equal(tensor, there.tensors[path][name])
    assert any(not torch.equal(t, last.tensors[p][n]) for p, g in best.tensors.items() for n, t in g.items())
    assert "valid loss" in (folder / "best" / "README.md").read_text(encoding="utf-8")


def test_patience_stops_the_run(watched: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    made_worse_after(monkeypatch, 4)
    result = train(watched(max_steps=20, patience=2))
    assert (result.stopped_by, result.steps) == ("patience", 8)
    assert [line["step"] for line in read_metrics(result.folder / "metrics.jsonl") if "loss" in line] == [
        2,
        4,
        6,
        8,
    ]
    with pytest.raises(ConfigError, match=r"train\.patience \(2\) was at its end.*train\.patience=4"):
        train(watched(max_steps=20, patience=2), resume=True)
    more = train(watched(max_steps=20, patience=4), resume=True)
    assert more.steps > 8


def test_a_new_run_forgets_the_best_of_the_old_one(watched: MakeRecipe) -> None:
    folder = train(watched(max_steps=4)).folder
    assert (folder / "best").is_dir()
    train(watched(max_steps=2, keep_best="none"), overwrite=True)
    assert not (folder / "best").exists()
    assert not (folder / "best.json").exists()
