"""Prefix and prompt tuning through recipes: to write and to classify, padded, resumed, and scored from their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.train import Recipe, evaluate, train
from tests.tiny_chat import write_rows
from tests.tiny_encoder import kind_rows, save_tiny_encoder
from tests.train.test_trainer import StopAt, assert_equal

MakeRecipe = Callable[..., Recipe]
ADAPTERS: dict[str, dict[str, Any]] = {
    "prefix": {"method": "prefix", "length": 4},
    "prefix_mlp": {"method": "prefix", "length": 4, "mlp": 16},
    "prompt": {"method": "prompt", "length": 8},
}
each = pytest.mark.parametrize("name", ADAPTERS)


@each
def test_they_learn_to_write_in_padded_batches(recipe: MakeRecipe, name: str) -> None:
    run = recipe(sections={"adapter": ADAPTERS[name]}, max_steps=40, lr=5e-2)
    result = train(run)
    assert result.losses[-1] < 0.8 * result.losses[0]
    config = json.loads((result.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == ("PROMPT_TUNING" if name == "prompt" else "PREFIX_TUNING")
    assert config["task_type"] == "CAUSAL_LM"
    rows = run.data.train  # type: ignore[attr-defined]
    measured = {
        "data": {"train": str(rows), "test": str(rows)},
        "evaluate": {"metrics": ["loss", "exact_match"]},
    }
    scored = Recipe.from_mapping({**run.plain(), **measured})
    from_file = evaluate(scored, adapter=result.adapter)
    here = evaluate(scored, model=result.model, tokenizer=result.tokenizer)
    assert from_file.scores == pytest.approx(here.scores, rel=1e-4)
    assert [a.answer for a in from_file.answers] == [a.answer for a in here.answers]


@each
def test_a_resumed_run_ends_with_the_same_bits(recipe: MakeRecipe, name: str) -> None:
    sections = {"adapter": ADAPTERS[name]}
    whole = train(recipe("whole", sections=sections, save_every=2))
    stopped = recipe("stopped", sections=sections, save_every=2)
    train(stopped, progress=StopAt(3))
    assert_equal(train(stopped, resume=True).adapter, whole.adapter)


def test_packing_is_refused_by_name(recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match="prefix tuning cannot tell the texts of a packed row apart"):
        train(recipe(sections={"adapter": ADAPTERS["prefix"]}, batching="packed"))


@each
def test_they_learn_to_classify_with_a_head(name: str, tmp_path: Path) -> None:
    folder, data = save_tiny_encoder(tmp_path / "bert"), tmp_path / "rows.jsonl"
    write_rows(data, kind_rows(45))
    run = Recipe.from_mapping(
        {
            "task": "classification",
            "model": str(folder),
            "adapter": ADAPTERS[name],
            "data": {"train": str(data), "test": str(data)},
            "train": {
                "max_steps": 80,
                "batch_rows": 9,
                "lr": 0.03 if name == "prefix_mlp" else 0.1,
                "warmup": 0,
            },
            "output": str(tmp_path / "run"),
        }
    )
    result = train(run)
    scored = evaluate(run, adapter=result.adapter)
    assert scored.scores["accuracy"] > 0.5
    state = lk.read(result.adapter)
    assert {"classifier.weight", "classifier.bias"} <= set(state.spec.methods)
