"""Rank, alpha and their patterns, of every method that has them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import lorakit as lk
from lorakit.errors import ConfigError, UnmatchedTargetError

METHODS = [lk.LoHa, lk.LoKr, lk.LoRAC]
methods = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)


@methods
def test_the_scale(method: Any) -> None:
    assert method(r=4, alpha=2).scale == 0.5
    assert method(r=1, alpha=-3).scale == -3


@methods
def test_patterns_choose_rank_and_alpha(method: Any) -> None:
    model = Net()
    lk.attach(
        model,
        method(r=1, alpha=5, rank_pattern={"second": 2}, alpha_pattern={"^first": 7}),
        ["first", "second"],
    )
    found = lk.extract(model).spec.methods
    assert (found["first"].r, found["first"].alpha) == (1, 7)  # type: ignore[attr-defined]
    assert (found["second"].r, found["second"].alpha) == (2, 5)  # type: ignore[attr-defined]


@methods
def test_a_pattern_that_matches_nothing_is_an_error(method: Any) -> None:
    with pytest.raises(UnmatchedTargetError, match="third"):
        lk.attach(Net(), method(r=1, rank_pattern={"third": 2}), ["first"])


@methods
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "at least 1; got r=0"),
        ({"r": 2.5}, "whole number"),
        ({"rank_pattern": {"a": -1}}, "at least 1"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"alpha": 1e308}, "alpha must be a finite number"),  # it overflows in float32
        ({"alpha_pattern": {"a": "1"}}, "alpha must be a finite number; got '1'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**settings)


@methods
def test_methods_can_be_hashed(method: Any) -> None:
    assert len({method(rank_pattern={"a": 1}), method(rank_pattern={"a": 1}), method()}) == 2
