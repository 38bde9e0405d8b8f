"""Starts that are computed from the training data, through a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.train import Recipe, train
from tests.train.test_trainer import assert_resumes

MakeRecipe = Callable[..., Recipe]


def settings(init: str, **adapter: Any) -> dict[str, Any]:
    return {"sections": {"adapter": {"r": 2, "init": init, **adapter}}, "batch_rows": 8}


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_it_starts_at_the_base_model_in_directions_of_the_data(
    recipe: MakeRecipe, init: str, batching: str
) -> None:
    plain = train(recipe("plain", max_steps=2, batching=batching, **settings("kaiming")))
    result = train(recipe("measured", max_steps=2, batching=batching, **settings(init)))
    assert result.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
    state = lk.extract(result.model)
    assert {m.init for m in state.spec.methods.values()} == {init}  # type: ignore[attr-defined]
    assert state.spec.info[init]["batches"] >= 1
    assert result.losses[1] != plain.losses[1]


def test_it_depends_on_the_batches_that_are_asked_for_and_on_nothing_else(recipe: MakeRecipe) -> None:
    def start(output: str, batches: int) -> torch.Tensor:
        made = recipe(output, max_steps=3, lr=1e-12, **settings("lora_ga", start_batches=batches))
        return lk.extract(train(made).model).tensors["model.layers.1.self_attn.q_proj"]["start_A"]

    one, again, more = start("one", 1), start("again", 1), start("more", 3)
    assert torch.equal(one, again)
    assert not torch.allclose(one, more)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_a_stopped_run_goes_on_bit_for_bit(recipe: MakeRecipe, init: str) -> None:
    common = {"max_steps": 4, **settings(init)}
    assert_resumes(lambda output: recipe(output, **common), 2)


def test_one_adapter_starts_in_one_way(recipe: MakeRecipe) -> None:
    groups = {"q_proj": {"r": 2, "init": "eva"}, "v_proj": {"r": 2, "init": "lora_ga"}}
    with pytest.raises(ConfigError, match=r"two measured ways: lorakit\.eva and lorakit\.lora_ga"):
        train(recipe(sections={"adapter": {"groups": groups, "start_batches": 2}}))
