"""DoRA: facts that hold whatever the numbers are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core import Shape
from lorakit.errors import ConfigError, UnsupportedTargetError
from tests.contracts.kinds import Host
from tests.contracts.pairs import Case, close, pairs

dora = pairs(settings=("dora", "dora_rslora"))


@dora
def test_the_rows_of_the_new_weight_are_as_long_as_the_magnitude(setting: str, kind: str) -> None:
    case = Case(kind)
    case.attach(setting)
    W, p = case.target().weight(), case.parameters("a")
    method = case.method("a")
    assert isinstance(method, lk.DoRA)
    close(method.weight(case.target(), p, W).norm(dim=-1), p["magnitude"].abs(), 1e-12)


@dora
def test_the_magnitude_starts_at_the_norms_of_the_base(setting: str, kind: str) -> None:
    case = Case(kind)
    case.attach(setting, random=False)
    close(case.parameters("a")["magnitude"], case.target().weight().norm(dim=-1), 1e-14)


def test_twice_the_magnitude_is_twice_the_output_without_bias() -> None:
    case = Case("linear")
    case.attach("dora")
    bias = case.model.layer.bias
    one = case.model(case.x) - bias
    with torch.no_grad():
        case.parameters("a")["magnitude"].mul_(2)
    close(case.model(case.x) - bias, 2 * one, 1e-12)


def test_the_length_of_the_direction_does_not_matter() -> None:
    case = Case("linear")
    case.attach("dora")
    y = case.model(case.x)
    with torch.no_grad():
        case.model.layer.weight.mul_(3)
        case.parameters("a")["lora_B"].mul_(3)
    close(case.model(case.x), y, 1e-12)


def test_the_count_of_the_paper() -> None:
    """LLaMA-7B, r = 32 on q, k, v, up and down: 56,975,360 (0.8455 % in the paper); half the rank: 28,925,952."""
    d, inner, layers = 4096, 11008, 32
    sizes = [(d, d)] * 3 + [(inner, d), (d, inner)]
    for r, count in ((32, 56_975_360), (16, 28_925_952)):
        method = lk.DoRA(lk.LoRA(r=r))
        shapes = [method.shapes(Shape("linear", out=o, in_=i)) for o, i in sizes]
        assert layers * sum(torch.Size(s).numel() for each in shapes for s in each.values()) == count


def test_a_row_of_zeros_stays_zero_and_finite() -> None:
    model = Host(nn.Linear(4, 3))
    with torch.no_grad():
        model.layer.weight[1] = 0
    x = torch.randn(5, 4)
    before = model(x)
    lk.attach(model, lk.DoRA(lk.LoRA(r=2)), ["layer"])
    y = model(x)
    assert torch.equal(y, before)
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in lk.trainable(model).values() if p.grad is not None)


def test_dropout_acts_on_the_change_alone() -> None:
    """With ``B = 0`` dropout changes nothing: the base term sees the whole input."""
    case = Case("linear")
    before = case.model(case.x)
    lk.attach(case.model, lk.DoRA(lk.LoRA(r=2, dropout=0.5)), ["layer"], name="a")
    assert torch.equal(case.model(case.x), before)
    with torch.no_grad():
        case.parameters("a")["lora_B"].normal_()
    assert not torch.equal(case.model(case.x), case.model(case.x))


@pytest.mark.parametrize(
    "inner", [lk.FullFineTuning(), lk.DoRA(), lk.TokenRows(ids=(1,)), "lora", None], ids=str
)
def test_it_wraps_methods_that_add_a_change(inner: object) -> None:
    with pytest.raises(ConfigError, match="DoRA wraps a method that adds a change"):
        lk.DoRA(inner)  # type: ignore[arg-type]


def test_what_the_inner_method_cannot_do_is_refused() -> None:
    with pytest.raises(UnsupportedTargetError, match=r"bias=False"):
        lk.attach(Host(nn.Linear(4, 4)), lk.DoRA(lk.LoRA(r=2, bias=True)), ["layer"])
    with pytest.raises(UnsupportedTargetError, match="no input to drop"):
        lk.attach(nn.MultiheadAttention(4, 2), lk.DoRA(lk.LoRA(r=2, dropout=0.1)), ["out_proj"])


def test_patterns_and_roles_are_those_of_the_inner_method() -> None:
    method = lk.DoRA(lk.LoRA(r=8, rank_pattern={"q": 2}))
    assert method.for_path("a.q") == lk.DoRA(lk.LoRA(r=2))
    assert method.patterns() == ("q",)
    assert method.roles["magnitude"] == "magnitude"
    assert method.roles["lora_A"] == "A"
