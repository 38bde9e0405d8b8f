"""The JSON schema of recipes takes what `Recipe` takes, and refuses the same typos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.core import METHODS
from lorakit.train import Recipe
from lorakit.train.recipe_file import parse
from lorakit.train.recipe_schema import recipe_schema

jsonschema_rs = pytest.importorskip("jsonschema_rs")
FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(set(FOLDER.glob("**/*.yaml")) - set(FOLDER.glob("accelerate/*")))  # those are accelerate's
SMALLEST: dict[str, Any] = {"model": "m", "data": {"train": "a.jsonl"}, "output": "o"}


@pytest.fixture(scope="module")
def valid() -> Any:
    return jsonschema_rs.validator_for(recipe_schema()).is_valid


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_are_valid(valid: Any, path: Path) -> None:
    values, _ = parse(path.read_text(encoding="utf-8"), path.name)
    assert valid(values)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"name": "m", "quantize": "nf4"}},
        {"adapter": {"r": 8, "alpha": 16, "rank_pattern": {"q_proj": 2}}},
        {"adapter": {"method": "dora", "r": 4}},
        {"adapter": {"method": "dora", "inner": "loha", "r": 4}},
        {"adapter": {"groups": {"q_proj": {"r": 2}, "norm": {"method": "full"}}}},
        {"train": {"lr": 1e-4, "betas": [0.9, 0.95], "fast": ["A"], "lora_plus_ratio": 4}},
        {"train": {"lr": "${RATE:-1e-4}", "epochs": 2}},
        {"data": {"builtin": "text_to_sql", "train": 10}},
        {
            "data": None,
            "adapters": [
                {"name": "a", "r": 2, "data": {"train": "a.jsonl"}},
                {"name": "b", "method": "dora", "r": 4, "lr": 1e-3, "data": {"train": "b.jsonl"}},
            ],
        },
    ],
)
def test_what_a_recipe_takes(valid: Any, sections: dict[str, Any]) -> None:
    values = {key: value for key, value in {**SMALLEST, **sections}.items() if value is not None}
    if "${" not in json.dumps(values):
        Recipe.from_mapping(values)
    assert valid(values)


@pytest.mark.parametrize(
    "sections",
    [
        {"trian": {}},
        {"train": {"learning_rate": 1e-4}},
        {"train": {"lr": "fast"}},
        {"train": {"schedule": "lineer"}},
        {"adapter": {"rank": 8}},
        {"adapter": {"method": "ia3", "r": 8}},
        {"adapter": {"method": "lorra"}},
        {"model": {"nmae": "m"}},
        {"data": {"trian": "a.jsonl"}},
        {"output": None},
        {"data": None},
        {"data": None, "adapters": []},
        {"data": None, "adapters": [{"name": "a", "rank": 2, "data": {"train": "a.jsonl"}}]},
    ],
)
def test_what_a_recipe_refuses(valid: Any, sections: dict[str, Any]) -> None:
    values = {key: value for key, value in {**SMALLEST, **sections}.items() if value is not None}
    with pytest.raises(ValueError):  # noqa: PT011 - what it says is tested with the recipe
        Recipe.from_mapping(values)
    assert not valid(values)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_its_settings_described(method: str) -> None:
    section = recipe_schema()["$defs"][f"AdapterSection_{method}"]
    assert section["properties"]["method"]["const"] == method
    assert section["additionalProperties"] is False
