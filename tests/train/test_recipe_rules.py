"""Settings that make no sense together are refused, each with a hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import RecipeError
from lorakit.train import Recipe

VALID = {"train": "/a.jsonl", "valid": "/b.jsonl"}


def made(**sections: Any) -> Recipe:
    return Recipe.from_mapping({"model": "m", "data": {"train": "/a.jsonl"}, "output": "/o", **sections})


BROKEN: list[tuple[str, dict[str, Any], str]] = [
    (
        "cache of a task with two texts",
        {"task": "dpo", "train": {"cache_frozen": "memory"}},
        r"rows of one text, task: causal-lm.*with task: dpo leave it out",
    ),
    (
        "cache and compiler",
        {"train": {"cache_frozen": "disk", "compile": True}},
        r"choose one of them\. The cache",
    ),
    (
        "compiler and checkpoints",
        {"train": {"compile": True, "activation_checkpointing": True}},
        r"train\.activation_checkpointing runs again",
    ),
    (
        "warmup",
        {"train": {"warmup": 20, "max_steps": 10}},
        r"would never reach train\.lr: make the warm-up shorter",
    ),
    ("eval", {"train": {"eval_every": 5}}, r"there is none: name data\.valid"),
    ("patience", {"data": VALID, "train": {"patience": 3}}, r"say how often, with train\.eval_every"),
    (
        "patience of nothing",
        {"data": VALID, "train": {"patience": 3, "eval_every": 5, "keep_best": "none"}},
        r"leave train\.keep_best at auto",
    ),
    ("improvement", {"train": {"min_improvement": 0.1}}, r"train\.patience, which is not set: set it"),
    ("best", {"data": VALID, "train": {"keep_best": "valid_loss"}}, r"set train\.eval_every too"),
    ("top_p", {"generate": {"top_p": 0.9}}, r"set a temperature such as 0\.7, or leave top_p out"),
    ("top_k", {"generate": {"top_k": 5}}, r"or leave top_k out"),
    (
        "start",
        {"adapter": {"start_batches": 4}},
        r"the starts eva, lora_ga; here the start is .*set adapter\.init",
    ),
    (
        "roles",
        {"adapter": {"method": "ia3"}, "train": {"lora_plus_ratio": 16}},
        r"makes B faster, and no method of the adapter has that: say which of gain",
    ),
]


@pytest.mark.parametrize(
    ("sections", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_a_broken_rule_says_what_to_do(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        made(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"warmup": 5, "max_steps": 10}},
        {"data": VALID, "train": {"eval_every": 5, "patience": 3, "min_improvement": 0.1}},
        {"data": VALID, "train": {"eval_every": 5, "keep_best": "valid_accuracy"}},
        {"generate": {"top_p": 0.9, "top_k": 5, "temperature": 0.7}},
        {"adapter": {"start_batches": 4, "init": "eva"}},
        {"adapter": {"method": "dora", "start_batches": 4, "init": "lora_ga"}},
        {"adapter": {"method": "ia3"}, "train": {"lora_plus_ratio": 16, "fast": ["gain"]}},
        {"adapter": {"method": "dora"}, "train": {"lora_plus_ratio": 16, "fast": ["B", "magnitude"]}},
        {"train": {"lora_plus_ratio": 4, "fast": ["official"]}},
    ],
)
def test_what_fits_together_is_taken(sections: dict[str, Any]) -> None:
    recipe = made(**sections)
    assert Recipe.from_mapping(recipe.plain()).plain() == recipe.plain()


def test_all_broken_rules_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        made(train={"eval_every": 5, "min_improvement": 1}, generate={"top_k": 3})
    for key in ("train.eval_every", "train.min_improvement", "generate.top_k"):
        assert key in str(caught.value)


def test_the_models_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"output is the model's own folder.*name another"):
        made(model=str(tmp_path), output=str(tmp_path))


def test_compiled_blocks_know_one_route() -> None:
    adapters = [{"name": name, "data": VALID} for name in "ab"]
    with pytest.raises(RecipeError, match=r"train\.compile would compile every block anew for each mix"):
        Recipe.from_mapping({"model": "m", "adapters": adapters, "train": {"compile": True}, "output": "/o"})
