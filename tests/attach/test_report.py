"""The report on a model: what is attached, what acts, what is merged, and what never ran."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import NotAttachedError
from tests.attach.small_models import Mlp, picture, with_adapters

X = torch.randn(5, 6)


class WithUnusedLayer(nn.Module):
    """A layer that forward never reaches, and one whose weight is read without a call of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)
        self.read = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.used(x), self.read.weight)


def test_what_never_ran_is_named() -> None:
    model = WithUnusedLayer()
    lk.attach(model, lk.LoRA(r=2))
    assert lk.report(model).never_ran == ("used", "unused", "read")
    model(X)
    report = lk.report(model)
    assert report.never_ran == ("unused", "read")
    assert "Never ran (2): unused, read" in str(report)
    assert [site.ran for site in report.adapters[0].sites] == [True, False, False]


def test_a_layer_that_only_lends_its_weight_can_be_adapted_as_a_parameter() -> None:
    model = WithUnusedLayer()
    before = model(X)
    lk.attach(model, lk.LoRA(r=2), ["read.weight"])
    with torch.no_grad():
        model.get_parameter("read.lorakit.weight.default.lora_B").fill_(1.0)
    assert (model(X) - before).abs().max() > 0.01
    assert lk.report(model).never_ran == ()


def test_active_and_merged_are_told() -> None:
    model = with_adapters(Mlp(), "a", "b")
    assert lk.report(model).active == {"a": 1.0}
    lk.set_active(model, {"a": 0.5, "b": 2})
    assert lk.report(model).active == {"a": 0.5, "b": 2.0}
    assert "Active: 0.5 * a + 2 * b. Merged: none." in str(lk.report(model))
    lk.merge(model)
    report = lk.report(model)
    assert report.merged == {"a": 0.5, "b": 2.0}
    assert "Merged: 0.5 * a + 2 * b." in str(report)
    lk.unmerge(model)
    lk.set_active(model, None)
    assert lk.report(model).active == lk.report(model).merged == {}
    assert "Active: none. Merged: none." in str(lk.report(model))


def test_a_use_block_is_not_the_default() -> None:
    model = with_adapters(Mlp(), "a", "b")
    with lk.use(model, "b"):
        assert lk.report(model).active == {"a": 1.0}


def test_sites_of_every_adapter_with_their_sizes() -> None:
    model = Mlp()
    lk.attach(model, lk.LoRA(r=2, rank_pattern={"fc2": 3}), name="a")
    lk.attach(model, {"fc1": lk.DoRA(lk.LoRA(r=4)), "norm": lk.FullFineTuning()}, name="b", trainable=False)
    a, b = lk.report(model).adapters
    assert [(s.path, s.size, s.rank, s.trainable) for s in a.sites] == [
        ("fc1", "8 x 6", 2, 2 * 14),
        ("fc2", "4 x 8", 3, 3 * 12),
    ]
    assert [(s.path, s.method, s.rank, s.parameters, s.trainable, s.binding) for s in b.sites] == [
        ("fc1", "dora", 4, 4 * 14 + 8, 0, "forward"),
        ("norm.weight", "full", None, 8, 0, "parameter"),
        ("norm.bias", "full", None, 8, 0, "parameter"),
    ]
    assert "(weight-bound)" in str(b)


def test_reporting_changes_nothing() -> None:
    model = with_adapters(Mlp(), "a")
    before = picture(model)
    str(lk.report(model))
    assert picture(model) == before


def test_a_model_without_adapters_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(NotAttachedError, match=r"Mlp carries no adapters. Call lorakit.attach"):
        lk.report(Mlp())
