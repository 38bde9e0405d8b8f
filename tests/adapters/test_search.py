"""The search for weights without gradients."""

from __future__ import annotations

import math

import pytest
import torch

import lorakit as lk
from lorakit.adapters import combine, search_weights
from lorakit.errors import ConfigError
from tests.adapters.states import change, linear, random_state


def test_it_finds_the_bottom_of_a_bowl() -> None:
    found = search_weights(lambda w: (w[0] - 1) ** 2 + 3 * (w[1] + 0.5) ** 2, 2, tries=300, penalty=0)
    assert found.loss < 1e-4
    assert found.weights == pytest.approx((1, -0.5), abs=0.02)
    assert len(found.tried) == 300
    assert found.tried[0] == ((0.0, 0.0), 1.75)
    assert found.loss == min(loss for _, loss in found.tried)


def test_it_composes_adapters() -> None:
    """The third of three adapters is the one wanted."""
    states = [random_state({"q": lk.LoRA(r=2, alpha=2)}, {"q": linear()}, seed=n) for n in range(3)]

    def loss(weights: tuple[float, ...]) -> float:
        return float((change(combine(states, weights, "lorahub").state) - change(states[2])).norm())

    found = search_weights(loss, 3, tries=200, penalty=0)
    assert found.loss < 0.2 * loss((0.0, 0.0, 0.0))


def test_bounds_penalty_seeds_and_losses_that_are_not_numbers() -> None:
    steep = search_weights(lambda w: -100 * w[0], 1, tries=60, bound=0.8)
    assert steep.weights == (0.8,)
    assert steep.loss == pytest.approx(-80 + 0.05 * 0.8)
    assert search_weights(lambda w: math.nan if w[0] else 1.0, 1).loss == 1.0
    a, b, c = (search_weights(lambda w: w[0] ** 2 - w[0], 1, seed=seed) for seed in (1, 1, 2))
    assert a == b != c
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="tries of at least 1"):
        search_weights(lambda w: 0.0, 1, tries=0)
    with pytest.raises(ConfigError, match="one start for each weight"):
        search_weights(lambda w: 0.0, 2, start=[1.0])
