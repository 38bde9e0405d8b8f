"""The whole way on real pretrained models, and the recipes of the repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.train import Recipe, Silent, TrainResult, evaluate, train
from lorakit.train.tasks import task_of
from tests.tiny_chat import write_rows

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LORAKIT_DATA", ROOT.parent / "shared" / "data"))
STORIES = DATA / "weights" / "stories260k"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_sound_and_their_data_can_be_read(path: Path) -> None:
    recipe = Recipe.from_file(path)
    task = task_of(recipe)
    for split in ("train", "valid", "test"):
        named = getattr(recipe.data, split)
        if task.has_split(split) and (not isinstance(named, Path) or named.is_file()):
            assert task.examples(split, None)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260k weights are not here (LORAKIT_DATA)")
def test_a_story_teller_learns_without_a_chat_template_and_to_stop_where_its_row_is_trained(
    tmp_path: Path,
) -> None:
    """Its stop token never occurred in pretraining: its row is that of 200 other unused tokens."""
    names = ("Lily", "Tom", "Ben", "Anna")
    rows = [
        {"prompt": f"Once upon a time, {name}", "completion": f"was happy. The end, {name}."}
        for name in names
    ]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))

    def run(output: str, adapter: dict[str, Any]) -> tuple[TrainResult, dict[str, float], list[str]]:
        said: list[str] = []

        class Listening(Silent):
            def say(self, line: str) -> None:
                said.append(line)

        recipe = Recipe.from_mapping(
            {
                "model": str(STORIES),
                "adapter": adapter,
                "data": {"train": file, "test": file},
                "train": {"max_steps": 60, "batch_rows": 4, "lr": 1e-2},
                "generate": {"max_new_tokens": 40},
                "evaluate": {"metrics": ["exact_match", "loss"]},
                "output": str(tmp_path / output),
            }
        )
        result = train(recipe, progress=Listening())
        return result, evaluate(recipe, adapter=result.adapter).scores, said

    frozen, scores, said = run("frozen", {"r": 8})
    assert scores["exact_match"] == 0
    (warning,) = [line for line in said if line.startswith("WARNING")]
    assert "the stop token '</s>' has all but the same output vector as" in warning
    groups = yaml.safe_load(warning.partition("adapter.groups: ")[2])
    groups["all-linear"]["r"] = 8
    result, scores, said = run("trained", {"groups": groups})
    assert not [line for line in said if line.startswith("WARNING")]
    assert scores["loss"] < 0.1 < frozen.losses[-1]
    assert scores["exact_match"] == 1.0
    assert result.adapter.is_dir()


@pytest.mark.model
def test_smollm2_learns_a_little_sql(tmp_path: Path) -> None:
    recipe = Recipe.from_mapping(
        {
            "model": "smollm2",
            "adapter": {"name": "sql", "r": 4},
            "data": {"builtin": "text_to_sql", "train": 4, "test": 2},
            "train": {"max_steps": 4, "batch_rows": 2, "lr": 1e-3, "warmup": 0},
            "generate": {"max_new_tokens": 8},
            "output": str(tmp_path / "run"),
        }
    )
    result = train(recipe)
    assert result.losses[-1] < result.losses[0]
    scored = evaluate(recipe, model=result.model, tokenizer=result.tokenizer)
    assert scored.count == 2
    again = evaluate(recipe, adapter=result.adapter)
    assert again.answers == scored.answers


@pytest.mark.model
def test_minilm_learns_kinds_of_words_and_knows_new_ones(tmp_path: Path) -> None:
    words = {
        "animal": "cat dog cow horse lion tiger wolf",
        "colour": "red green blue black white yellow grey",
        "food": "bread cheese soup rice meat cake pasta",
    }
    new = {"animal": "sheep bear", "colour": "purple orange", "food": "butter pizza"}

    def file(name: str, kinds: dict[str, str]) -> str:
        rows = [{"text": word, "label": kind} for kind, each in kinds.items() for word in each.split()]
        return str(write_rows(tmp_path / name, rows))

    recipe = Recipe.from_mapping(
        {
            "task": "classification",
            "model": "minilm",
            "adapter": {"r": 4},
            "data": {"train": file("train.jsonl", words), "test": file("test.jsonl", new)},
            "train": {"max_steps": 12, "batch_rows": 21, "lr": 5e-3, "warmup": 2},
            "output": str(tmp_path / "run"),
        }
    )
    result = train(recipe)
    in_a_layer = 4 * (4 * (384 + 384) + 2 * (384 + 1536))  # query, key, value, output; up and down
    assert result.report.trainable == 6 * in_a_layer + 4 * (384 + 384) + 3 * 384 + 3  # and pooler, and head
    assert result.losses[-1] < 0.3 * result.losses[0]
    assert evaluate(recipe, adapter=result.adapter).scores["accuracy"] > 0.8
