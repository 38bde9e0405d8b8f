"""Targets without a gradient are reported."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from lorakit.models import load_model
from lorakit.train import Recipe, train
from lorakit.train.gradient_watch import STEPS
from lorakit.train.progress import Silent

MakeRecipe = Callable[..., Recipe]


class Listener(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("steps", [3, STEPS + 2])
def test_a_layer_that_does_not_reach_the_loss(recipe: MakeRecipe, steps: int) -> None:
    made = recipe(max_steps=steps, lr=1e-3)
    model = load_model(made.model.name)
    # What the last layer's v_proj makes is thrown away: its o_proj is zero.
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    made = recipe(
        max_steps=steps, lr=1e-3, sections={"adapter": {"r": 2, "targets": ["v_proj", "gate_proj"]}}
    )
    told = Listener()
    result = train(made, model=model, progress=told)
    assert result.silent == ("model.layers.1.self_attn.v_proj",)
    (line,) = [line for line in told.lines if "no gradient" in line]
    assert line.startswith("1 targets had no gradient")
    run = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))
    assert run["ended"]["without_gradient"] == ["model.layers.1.self_attn.v_proj"]


def test_where_all_learn_nothing_is_said(recipe: MakeRecipe) -> None:
    told = Listener()
    assert train(recipe(max_steps=3), progress=told).silent == ()
    assert not any("gradient" in line for line in told.lines)
