"""Every key, found in the models."""

from __future__ import annotations

import pytest

from lorakit.train import Recipe
from lorakit.train.recipe import AdapterSection, TrainSection
from lorakit.train.recipe_file import with_override
from lorakit.train.recipe_keys import Key, data_models, recipe_keys

KEYS = {key.name: key for key in recipe_keys()}


def test_all_sections_are_there_once() -> None:
    assert len(KEYS) == len(recipe_keys())
    assert {f"train.{name}" for name in TrainSection.model_fields} <= set(KEYS)
    assert {f"adapter.{name}" for name in AdapterSection.model_fields} <= set(KEYS)
    for model in data_models():
        assert {f"data.{name}" for name in model.model_fields} <= set(KEYS)
    assert {"task", "output", "model.name", "generate.top_p", "evaluate.limit"} <= set(KEYS)


@pytest.mark.parametrize(
    "key", [key for key in recipe_keys() if key.section != "method"], ids=lambda key: key.name
)
def test_every_key_is_described(key: Key) -> None:
    assert key.about.endswith(".")
    assert key.kind


def test_a_setting_of_several_methods_names_them() -> None:
    assert "(lora, " in KEYS["adapter.r"].about
    assert KEYS["adapter.target_r"].about.endswith("(adalora)")


def test_kinds_and_defaults_are_words_of_yaml() -> None:
    assert (KEYS["train.lr"].kind, KEYS["train.lr"].default) == ("NUMBER", "0.0002")
    assert KEYS["train.activation_checkpointing"].default == "false"
    assert KEYS["train.schedule"].kind == "linear|cosine|constant"
    assert KEYS["train.betas"].default == "[0.9, 0.999]"
    assert KEYS["output"].kind == "PATH"


@pytest.mark.parametrize("key", [key for key in recipe_keys() if key.section == "train" and key.default])
def test_a_default_that_is_set_changes_nothing(key: Key) -> None:
    values = {"model": "m", "data": {"train": "/a.jsonl"}, "output": "/o"}
    set_to = with_override(values, f"{key.name}={key.default}")
    assert Recipe.from_mapping(set_to).plain() == Recipe.from_mapping(values).plain()
