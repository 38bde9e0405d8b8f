"""What PEFT has no words for, and why; and that the reasons are PEFT's own limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.core import AdapterSpec, AdapterState, Method
from lorakit.core.target import Shape
from lorakit.io import Outline, why_not_peft
from lorakit.io.peft_writer import to_peft
from lorakit.methods import BitFit, DoRA, FullFineTuning, LoRA, TokenRows

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")  # theirs, and many

LINEAR = Shape("linear", 4, 6)
TABLE = Shape("embedding", 4, 9)
R2 = LoRA(r=2)


def matrix(out: int = 4, in_: int = 6, *batch: int) -> Shape:
    return Shape("parameter", out, in_, batch, stored=(*batch, out, in_))


def vector(n: int = 4) -> Shape:
    return Shape("parameter", n, 1, stored=(n,))


def state(targets: dict[str, tuple[Method, Shape]], **peft: Any) -> AdapterState:
    spec = AdapterSpec(
        {p: m for p, (m, _) in targets.items()},
        {p: s for p, (_, s) in targets.items()},
        info={"peft": peft} if peft else {},
    )
    return AdapterState(
        spec, {p: {n: torch.randn(z) for n, z in m.shapes(s).items()} for p, (m, s) in targets.items()}
    )


FC = {"a.fc": (R2, LINEAR)}

CANNOT: dict[str, tuple[dict[str, tuple[Method, Shape]], str]] = {
    "no target at all": ({}, "at least one LoRA target"),
    "bitfit": ({**FC, "a.fc.bias": (BitFit(), vector())}, "no place for 'bitfit'"),
    "only whole parameters": ({"a.norm.weight": (FullFineTuning(), vector())}, "at least one LoRA target"),
    "the model itself": ({"": (R2, LINEAR)}, "the model itself"),
    "a parameter of the model itself": ({"scale": (R2, matrix())}, "a parameter of the model itself"),
    "a whole parameter of the model itself": (
        {**FC, "scale": (FullFineTuning(), vector())},
        "a parameter of the model itself",
    ),
    "a word of PEFT's": ({"a.base_layer.fc": (R2, LINEAR)}, "'base_layer' in its path"),
    "a name like PEFT's": ({"a.lora_down": (R2, LINEAR)}, "'lora_down' in its path"),
    "groups": ({"conv": (R2, Shape("conv", 4, 6, (2,), (3,)))}, "2 groups"),
    "LoRA and DoRA": ({**FC, "b.fc": (DoRA(R2), LINEAR)}, "either LoRA or DoRA"),
    "two scalings": ({**FC, "b.fc": (LoRA(r=2, scaling="rslora"), LINEAR)}, "one scaling"),
    "two dropouts": ({**FC, "b.fc": (LoRA(r=2, dropout=0.1), LINEAR)}, "one dropout"),
    "two inits": ({**FC, "b.fc": (LoRA(r=2, init="gaussian"), LINEAR)}, "one init"),
    "a bias at some": ({**FC, "b.fc": (LoRA(r=2, bias=True), LINEAR)}, "one bias"),
    "a bias on an embedding": ({"wte": (LoRA(r=2, bias=True), TABLE)}, "no bias for LoRA on an embedding"),
    "patterns": ({"a.fc": (LoRA(r=2, rank_pattern={"x": 3}), LINEAR)}, "not resolved"),
    "DoRA on a bare weight": ({"a.up": (DoRA(R2), matrix())}, "no dropout, bias or DoRA"),
    "dropout on a bare weight": ({"a.up": (LoRA(r=2, dropout=0.1), matrix())}, "no dropout, bias or DoRA"),
    "a vector": ({"a.gain": (LoRA(r=1), vector())}, "two or three dimensions"),
    "four dimensions": ({"a.up": (R2, matrix(4, 6, 2, 3))}, "two or three dimensions"),
    "a layer and its weight": ({**FC, "a.fc.weight": (R2, matrix())}, "both"),
    "parameters in an order of their own": (
        {"a.alpha": (R2, matrix()), "a.beta": (R2, matrix())},
        "in the order in which",
    ),
    "half an attention": (
        {"a.q_proj_weight": (R2, matrix()), "a.out_proj": (R2, LINEAR)},
        "together or not at all",
    ),
    "two ranks in an attention": (
        {"a.in_proj_weight": (R2, matrix()), "a.out_proj": (LoRA(r=3), LINEAR)},
        "one rank and alpha",
    ),
    "a saved module around a layer": (
        {"a.fc": (R2, LINEAR), "a.gain": (FullFineTuning(), vector())},
        "both adapt 'a' and save",
    ),
    "a parameter that may be part of a module": (
        {**FC, "b.gain": (FullFineTuning(), vector())},
        "may not be all of its module",
    ),
    "token rows in a wrapped module": (
        {"m.up_proj": (R2, matrix()), "m.wte": (TokenRows((1,)), TABLE)},
        "lies in a module that it wraps",
    ),
}


@pytest.mark.parametrize("name", CANNOT)
def test_reasons(name: str) -> None:
    targets, reason = CANNOT[name]
    reasons = why_not_peft(state(targets))
    assert any(reason in text for text in reasons), reasons


def test_all_reasons_are_given() -> None:
    reasons = why_not_peft(
        state(
            {
                "conv": CANNOT["groups"][0]["conv"],
                "a.fc": (LoRA(r=2, dropout=0.5), LINEAR),
                "a.up": (DoRA(R2), matrix()),
            }
        )
    )
    assert len(reasons) == 4


@pytest.mark.parametrize(
    ("targets", "settings"),
    [
        (
            {**FC, "b.norm.weight": (FullFineTuning(), vector())},
            {"modules_to_save": ["b.norm"], "bias": "none"},
        ),
        ({**FC, "b.norm.bias": (FullFineTuning(), vector())}, {"modules_to_save": None, "bias": "all"}),
        ({**FC, "a.fc.bias": (FullFineTuning(), vector())}, {"modules_to_save": None, "bias": "lora_only"}),
        ({**FC, "bias": (FullFineTuning(), vector())}, {"bias": "all"}),
        ({**FC, "wte": (TokenRows((3, 1)), TABLE)}, {"trainable_token_indices": {"wte": [3, 1]}}),
        ({"a.up": (R2, matrix(4, 6, 3))}, {"target_modules": [], "target_parameters": ["a.up"]}),
        (
            {"a.fc": (LoRA(r=2, alpha=0.5, scaling="rslora", dropout=0.25), LINEAR)},
            {"lora_alpha": 0.5, "use_rslora": True, "lora_dropout": 0.25},
        ),
        (
            {"a.in_proj_weight": (R2, matrix()), "a.out_proj": (R2, LINEAR)},
            {"target_modules": "a", "target_parameters": None},
        ),
        (
            {"a.in_proj_weight": (R2, matrix())},
            {"target_modules": [], "target_parameters": ["a.in_proj_weight"]},
        ),
        ({"a.out_proj": (R2, LINEAR)}, {"target_modules": ["a.out_proj"]}),
    ],
)
def test_settings(targets: dict[str, tuple[Method, Shape]], settings: dict[str, Any]) -> None:
    form = to_peft(state(targets))
    assert form.reasons == []
    assert {key: form.config[key] for key in settings} == settings


def test_a_model_at_hand_settles_what_a_state_leaves_open() -> None:
    attention = Outline({"a.in_proj_weight": (12, 4), "a.out_proj.weight": (4, 4)})
    assert "together or not at all" in why_not_peft(state({"a.out_proj": (R2, LINEAR)}), outline=attention)[0]
    norm = {**FC, "b.norm.weight": (FullFineTuning(), vector())}
    half = Outline({"a.fc.weight": (4, 6), "b.norm.weight": (4,), "b.norm.bias": (4,)})
    assert "without 'b.norm.bias'" in why_not_peft(state(norm), outline=half)[0]
    assert why_not_peft(state(norm), outline=Outline({"a.fc.weight": (4, 6), "b.norm.weight": (4,)})) == []
    gain = {**FC, "b.gain": (FullFineTuning(), vector())}
    assert why_not_peft(state(gain), outline=Outline({"a.fc.weight": (4, 6), "b.gain": (4,)})) == []
    odd = {"a.alpha": (R2, matrix()), "a.beta": (R2, matrix())}
    form = to_peft(state(odd), Outline({"a.beta": (4, 6), "a.alpha": (4, 6)}))
    assert form.reasons == []
    assert [name for name, _, _ in form.parameters["a"]] == ["beta", "alpha"]


def test_names_that_are_endings_of_others() -> None:
    outline = Outline(
        {
            "a.fc.weight": (4, 6),
            "norm.weight": (4,),
            "deep.norm.weight": (4,),
            "wte.weight": (9, 4),
            "x.my_wte.weight": (9, 4),
            "m.up": (4, 6),
            "x.m.up": (4, 6),
        }
    )
    for targets in (
        {**FC, "norm.weight": (FullFineTuning(), vector())},
        {**FC, "wte": (TokenRows((1,)), TABLE)},
        {"m.up": (R2, matrix())},
    ):
        assert "by its ending" in why_not_peft(state(targets), outline=outline)[0]
        assert why_not_peft(state(targets)) == []  # not to be known without the model
    deep = {
        **FC,
        "deep.norm.weight": (FullFineTuning(), vector()),
        "x.m.up": (R2, matrix()),
        "x.my_wte": (TokenRows((1,)), TABLE),
    }
    assert why_not_peft(state(deep), outline=outline) == []


def test_the_first_name_is_the_innermost() -> None:
    targets = state({"m.down_proj": (R2, matrix(4, 6, 3)), "m.gate_up_proj": (R2, matrix(5, 7, 3))})
    form = to_peft(targets)
    assert form.tensors["base_model.model.m.base_layer.lora_A.weight"].shape == (6, 7)
    assert form.tensors["base_model.model.m.lora_A.weight"].shape == (6, 6)


# ---- that PEFT cannot, or does something else
def test_peft_on_groups_is_another_set_of_functions() -> None:
    """A grouped A of ours gives a zero block where PEFT's mixes channels: no setting of one is the other."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Conv2d(4, 6, 1, groups=2, bias=False))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    assert layer.lora_A["default"].weight.shape == (2, 4, 1, 1)  # all four input channels
    nn.init.ones_(layer.lora_B["default"].weight)
    nn.init.zeros_(layer.base_layer.weight)
    x = torch.zeros(1, 4, 1, 1)
    x[0, 0] = 1  # a channel of the first group only
    assert model(x)[0, 3:].abs().sum() > 0  # reaches the second group's output


def test_peft_refuses_what_we_say_it_refuses() -> None:
    peft = pytest.importorskip("peft")

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.Module()
            self.m.up = nn.Parameter(torch.randn(4, 6))
            self.top = nn.Parameter(torch.randn(4, 6))
            self.wte = nn.Embedding(9, 4)

    def refused(**settings: Any) -> None:
        with pytest.raises((ValueError, TypeError)):
            peft.get_peft_model(Bare(), peft.LoraConfig(r=2, **{"target_modules": [], **settings}))

    peft.get_peft_model(Bare(), peft.LoraConfig(r=2, target_modules=[], target_parameters=["m.up"]))
    refused(target_parameters=["m.up"], use_dora=True)
    refused(target_parameters=["m.up"], lora_dropout=0.1)
    refused(target_parameters=["top"])
    refused(target_modules=["wte"], lora_bias=True)
