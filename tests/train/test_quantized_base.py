"""QLoRA and LoftQ through a recipe: the base is quantised, the head stays dense, and scoring finds the same base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.core.walk import base_modules
from lorakit.errors import ConfigError, RecipeError
from lorakit.models import load_model, load_tokenizer
from lorakit.targets.counting import base_bytes
from lorakit.targets.quantized import quantized_storage
from lorakit.train import Recipe, evaluate, train
from lorakit.train.merging import merge_to_folder
from tests.tiny_chat import write_rows
from tests.tiny_encoder import kind_rows, save_tiny_encoder
from tests.train.test_trainer import assert_resumes

MakeRecipe = Callable[..., Recipe]


def quantized(model: torch.nn.Module) -> list[str]:
    return [path for path, module in base_modules(model) if quantized_storage(module) is not None]


@pytest.fixture
def kinds(tmp_path: Path) -> MakeRecipe:
    """Make a recipe that tells kinds apart on a quantised encoder."""
    rows = str(write_rows(tmp_path / "rows.jsonl", kind_rows(45)))

    def make(output: str, model: dict[str, Any], adapter: dict[str, Any], pooler: bool = True) -> Recipe:
        folder = tmp_path / f"bert-{pooler}"
        if not folder.exists():
            save_tiny_encoder(folder, pooler=pooler)
        return Recipe.from_mapping(
            {
                "task": "classification",
                "model": {"name": str(folder), **model},
                "adapter": {"r": 4, **adapter},
                "data": {"train": rows, "test": rows},
                "train": {"max_steps": 40, "batch_rows": 9, "lr": 1e-2, "warmup": 0},
                "output": str(tmp_path / output),
            }
        )

    return make


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("loftq", [0, 2])
@pytest.mark.parametrize("pooler", [True, False], ids=["pooler", "fresh pooler"])
def test_it_learns_on_fewer_bits_and_is_scored_on_the_same_base(
    kinds: MakeRecipe, storage: str, loftq: int, pooler: bool
) -> None:
    recipe = kinds("run", {"quantize": storage}, {"loftq_iterations": loftq}, pooler)
    result = train(recipe)
    paths = quantized(result.model)
    assert len(paths) == (13 if pooler else 12)
    assert not [path for path in paths if "classifier" in path]
    assert ("bert.pooler.dense" in paths) == pooler  # a fresh one is part of the head, which stays dense
    assert base_bytes(result.model) < 0.8 * base_bytes(train(kinds("dense", {}, {}, pooler)).model)
    assert ("loftq" in lk.read(result.adapter).spec.info) == bool(loftq)
    assert result.losses[-1] < 0.6 * result.losses[0]
    apart = evaluate(recipe, adapter=result.adapter)
    here = evaluate(recipe, model=result.model, tokenizer=result.tokenizer)
    assert apart.scores == pytest.approx(here.scores, rel=1e-5)
    assert apart.scores["accuracy"] > 0.7


def test_loftq_starts_nearer_to_the_dense_model_than_quantising_alone(recipe: MakeRecipe) -> None:
    def first_loss(output: str, model: dict[str, Any], **adapter: Any) -> float:
        sections = {"model": {"name": recipe().model.name, **model}, "adapter": {"r": 8, **adapter}}
        settings = {"max_steps": 1, "batch_rows": 24, "lr": 1e-12, "epochs": None}
        return train(recipe(output, sections=sections, **settings)).losses[0]

    dense = first_loss("dense", {})
    nf4 = first_loss("nf4", {"quantize": "nf4"})
    loftq = first_loss("loftq", {"quantize": "nf4"}, loftq_iterations=5)
    assert 0 < abs(loftq - dense) < abs(nf4 - dense)


def test_a_stopped_run_goes_on_bit_for_bit(recipe: MakeRecipe) -> None:
    sections = {
        "model": {"name": recipe().model.name, "quantize": "nf4"},
        "adapter": {"r": 4, "loftq_iterations": 2},
    }
    settings: dict[str, Any] = {"max_steps": 4, "sections": sections}
    assert_resumes(lambda output: recipe(output, **settings), 2)


def test_a_qlora_is_merged_into_the_dense_base_and_a_loftq_is_not(kinds: MakeRecipe, tmp_path: Path) -> None:
    qlora = train(kinds("qlora", {"quantize": "int8"}, {}))
    name = kinds("x", {}, {}).model.name
    assert merge_to_folder(name, [qlora.adapter], tmp_path / "merged").saved_difference < 1e-3
    loftq = train(kinds("loftq", {"quantize": "int8"}, {"loftq_iterations": 1}))
    with pytest.raises(ConfigError, match="was started by LoftQ: it belongs to the quantised base"):
        merge_to_folder(name, [loftq.adapter], tmp_path / "other")


def test_a_model_that_is_handed_in_is_not_quantised_behind_its_back(recipe: MakeRecipe) -> None:
    name = recipe().model.name
    made = recipe(max_steps=1, sections={"model": {"name": name, "quantize": "nf4"}})
    model, tokenizer = load_model(name), load_tokenizer(name)
    with pytest.raises(ConfigError, match=r"is dense: call lorakit\.quantize on it first"):
        train(made, model=model, tokenizer=tokenizer)
    lk.quantize(model, "nf4")
    assert quantized(train(made, model=model, tokenizer=tokenizer).model)
    loftq = recipe(
        "l", sections={"model": {"name": name, "quantize": "nf4"}, "adapter": {"loftq_iterations": 1}}
    )
    with pytest.raises(ConfigError, match="is for a model that lorakit loads itself"):
        train(loftq, model=model, tokenizer=tokenizer)


def test_what_makes_no_sense(recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"set model\.quantize to nf4 or int8"):
        recipe(sections={"adapter": {"loftq_iterations": 5}})
    groups = {"groups": {"q_proj": {"r": 2}}, "loftq_iterations": 1}
    sections = {"model": {"name": recipe().model.name, "quantize": "nf4"}, "adapter": groups}
    with pytest.raises(ConfigError, match="use method, not groups"):
        train(recipe(sections=sections))
