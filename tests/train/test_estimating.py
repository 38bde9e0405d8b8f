"""What a recipe will cost, from the recipe, the config and the data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.errors import ModelError
from lorakit.train import Recipe, train
from lorakit.train.estimating import advice, estimate, live_architecture, terms
from lorakit.train.task_plan import task_plan
from lorakit.train.tasks import task_of

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize("batching", ["auto", "padded"])
def test_it_is_what_the_run_does(recipe: MakeRecipe, batching: str) -> None:
    made = recipe(epochs=2, max_steps=None, batch_rows=5, accumulation=2, batching=batching)
    found, result = estimate(made), train(made)
    assert found.shape.measured
    assert found.shape.steps == result.steps
    assert found.plan.counts.trainable == result.report.trainable
    assert found.plan.counts.base == result.report.base_parameters
    assert found.shape.packed == (batching == "auto")
    if batching == "auto":
        assert found.shape.tokens == result.tokens
    else:
        assert found.shape.tokens is not None
        assert found.shape.tokens >= result.tokens  # padding is computed too
    assert not found.why


def test_without_a_tokenizer_the_recipe_is_all_there_is(
    recipe: MakeRecipe, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "*.safetensors"))
    made = recipe(sections={"model": str(tmp_path / "bare")}, batch_rows=3, max_length=100)
    found = estimate(made)
    assert (found.shape.rows, found.shape.length, found.shape.measured) == (3, 100, False)
    assert found.seconds is None
    assert "the rows" in found.why[0]


def test_a_model_that_is_not_here(recipe: MakeRecipe) -> None:
    with pytest.raises(
        ModelError, match=r"not on this machine, and an estimate fetches nothing.*config\.json"
    ):
        estimate(recipe(sections={"model": "nobody/nothing-there"}))


def test_the_head_of_a_classifier_is_counted(tmp_path: Path) -> None:
    from tests.tiny_chat import write_rows
    from tests.tiny_encoder import save_tiny_encoder

    folder = save_tiny_encoder(tmp_path / "encoder")
    rows = [{"text": f"word {i}", "label": ("a", "b", "c")[i % 3]} for i in range(12)]
    data = {"train": str(write_rows(tmp_path / "train.jsonl", rows))}
    made = Recipe.from_mapping(
        {
            "task": "classification", "model": str(folder), "adapter": {"r": 2}, "data": data,
            "train": {"max_steps": 1, "batch_rows": 4}, "output": str(tmp_path / "run"),
        }
    )  # fmt: skip
    found = estimate(made)
    assert found.plan.counts.trainable == train(made).report.trainable


def test_terms_and_advice_follow_the_plan(recipe: MakeRecipe) -> None:
    planned = estimate(recipe()).plan
    sizes = [size for _, size in terms(planned)]
    assert sizes == sorted(sizes, reverse=True)
    assert planned.training is not None
    assert sum(sizes) == planned.training.total
    lines = advice(planned)
    assert any(line.startswith("half of train.batch_rows with train.accumulation: 2") for line in lines)
    checkpointed = estimate(recipe(activation_checkpointing=True, batch_rows=1)).plan
    assert not any(
        "activation_checkpointing" in line or "batch_rows" in line for line in advice(checkpointed)
    )


def test_what_is_saved_by_quantising(recipe: MakeRecipe) -> None:
    def weights(storage: str | None) -> int:
        found = estimate(recipe(sections={"model": {"name": recipe().model.name, "quantize": storage}}))
        assert found.plan.training is not None
        return found.plan.training.weights

    assert weights("nf4") < weights("int8") < weights(None)


def test_a_loaded_model_is_planned_like_its_config(recipe: MakeRecipe) -> None:
    made = recipe()
    found = estimate(made)
    result = train(made)
    again = task_plan(task_of(made), live_architecture(result.model), found.shape)
    assert again.training == found.plan.training
    assert json.dumps(found.plain())


def test_all_adapters_of_one_pass_are_planned(recipe: MakeRecipe, tmp_path: Path) -> None:
    data = {"train": str(tmp_path / "train.jsonl")}
    single = recipe(epochs=1, max_steps=None, batch_rows=3)
    plain = {key: value for key, value in single.plain().items() if key not in ("adapter", "data")}
    plain["train"] = {key: value for key, value in plain["train"].items() if value is not None}
    big = {"name": "big", "r": 8, "targets": "all-linear", "data": data}
    small = {"name": "small", "r": 2, "targets": r".*layers\.1\..*_proj", "data": data}
    made = Recipe.from_mapping({**plain, "adapters": [big, small]})
    found, result = estimate(made), train(made)
    trainable = {name: counts.trainable for name, counts in found.adapters.items()}
    assert trainable == {name: report.trainable for name, report in result.reports.items()}
    assert found.plan.counts.trainable == sum(trainable.values())
    assert (found.shape.rows, found.shape.shares) == (6, (3, 3))
    assert found.shape.steps == result.steps
    training = found.plan.training
    assert training is not None
    assert training.adapter == training.gradients == 4 * sum(trainable.values())
    alone = [
        estimate(Recipe.from_mapping({**plain, "adapters": [one]})).plan.training for one in (big, small)
    ]
    assert all(one is not None and training.activations > one.activations for one in alone)
    assert found.plain()["adapters"]["small"]["trainable"] == trainable["small"]


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_the_cache_of_the_frozen_part_is_told(recipe: MakeRecipe, where: str) -> None:
    upper = {"adapter": {"r": 4, "targets": r".*layers\.1\..*_proj"}}
    plain = estimate(recipe(sections=upper, epochs=4, max_steps=None))
    found = estimate(recipe(sections=upper, epochs=4, max_steps=None, cache_frozen=where))
    assert plain.frozen_cache is None
    assert plain.shape.distinct is not None
    assert plain.shape.tokens == 4 * plain.shape.distinct
    assert found.frozen_cache == plain.shape.distinct * 32 * 4
    if plain.seconds is not None and found.seconds is not None:
        assert 0 < found.seconds < plain.seconds
