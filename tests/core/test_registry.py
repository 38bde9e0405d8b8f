"""Methods by name, and methods as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

import lorakit as lk
from lorakit.core import METHODS, Method, method_from_json, register, registry
from lorakit.errors import ConfigError


@dataclass(frozen=True)
class Halve(Method):
    """A method from elsewhere."""

    factor: float = 0.5

    def shapes(self, shape: Any) -> dict[str, tuple[int, ...]]:
        return {}

    def start(self, target: Any, generator: Any, shared: Any) -> dict[str, Tensor]:
        return {}

    def forward(self, target: Any, p: Any, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
        return y * self.factor


@pytest.fixture(autouse=True)
def _same_methods_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "METHODS", dict(METHODS))


@pytest.mark.parametrize(
    "method",
    [
        lk.LoRA(),
        lk.LoRA(r=3, alpha=0.5, scaling="rslora", dropout=0.1, init="gaussian", bias=True),
        lk.LoRA(rank_pattern={"up_proj": 4, "^a.*": 2}, alpha_pattern={"up_proj": 8.0}),
        lk.DoRA(lk.LoRA(r=2, rank_pattern={"q": 1})),
        lk.FullFineTuning(),
        lk.BitFit(),
        lk.TokenRows(ids=(5, 1)),
    ],
    ids=lambda m: m.name,
)
def test_a_method_survives_json(method: Method) -> None:
    text = json.dumps(method.to_json())
    again = method_from_json(json.loads(text))
    assert again == method
    assert type(again) is type(method)
    assert json.dumps(again.to_json()) == text


def test_missing_settings_take_their_defaults() -> None:
    assert method_from_json({"method": "lora", "r": 4}) == lk.LoRA(r=4)
    assert method_from_json({"method": "dora"}) == lk.DoRA()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "lroa"}, "No method is called 'lroa'. Did you mean 'lora'"),
        ({"method": "zzz"}, "Known:.*lora"),
        ({"method": "lora", "rank": 4}, "LoRA has no setting 'rank'.*Settings:"),
        ({"method": "lora", "alfa": 4}, "Did you mean 'alpha'"),
        ({"method": "dora", "inner": {"method": "lora", "rr": 1}}, "LoRA has no setting 'rr'"),
        ({"r": 4}, "'method' key"),
        ({"method": "lora", "r": "4"}, "whole number"),
        ({"method": "lora", "alpha": "16"}, "finite number"),
        ({"method": "dora", "inner": "lora"}, "wraps a method"),
    ],
)
def test_a_wrong_description_says_what_was_meant(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_from_json(data)


def test_a_new_method_is_registered_under_its_name() -> None:
    assert register("halve")(Halve) is Halve
    assert Halve.name == "halve"
    assert method_from_json({"method": "halve", "factor": 0.25}) == Halve(0.25)
    assert register("halve")(Halve) is Halve, "again is harmless"


def test_a_name_is_given_once() -> None:
    with pytest.raises(ConfigError, match="already registered"):
        register("lora")(Halve)


def test_a_plug_in_is_loaded_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "halve"
        loaded = 0

        def load(self) -> type[Method]:
            Entry.loaded += 1
            return Halve

    monkeypatch.setattr(
        registry, "entry_points", lambda group: [Entry()] if group == "lorakit.methods" else []
    )
    registry.method_class("lora")
    assert Entry.loaded == 0
    assert registry.method_class("halve") is Halve
    assert Entry.loaded == 1
