"""Attaching: what it reports, what it changes, and that a failing call changes nothing at all."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterNameError,
    ConfigError,
    MergeError,
    TargetError,
    UnmatchedTargetError,
    UnsupportedTargetError,
)
from tests.attach.small_models import Mlp, TiedLm, fill, picture, with_adapters

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


# ---- the report ---------------------------------------------------------------------------------------------------
def test_the_report_counts_what_was_attached() -> None:
    model = Mlp()
    report = lk.attach(model, lk.LoRA(r=2), name="sql")
    assert [site.path for site in report.sites] == ["fc1", "fc2"]
    assert [site.parameters for site in report.sites] == [2 * (6 + 8), 2 * (8 + 4)]
    assert report.parameters == report.trainable == 2 * (6 + 8) + 2 * (8 + 4)
    assert report.base_parameters == sum(p.numel() for p in Mlp().parameters())
    assert report.active == ("sql",)
    assert {(s.kind, s.method, s.rank, s.binding, s.ran) for s in report.sites} == {
        ("linear", "lora", 2, "forward", False)
    }


def test_the_report_prints_counts_and_says_when_the_adapter_does_not_act() -> None:
    model = Mlp()
    assert "Adapter 'a': 2 targets, 52 parameters" in str(lk.attach(model, lk.LoRA(r=2), name="a"))
    second = str(lk.attach(model, lk.LoRA(r=2), name="b"))
    assert "Active: a." in second
    assert "lorakit.use(model, 'b')" in second


def test_a_state_is_reported_with_nothing_trainable() -> None:
    model = Mlp()
    lk.attach(model, lk.LoRA(r=2))
    report = lk.attach(Mlp(), lk.extract(model))
    assert (report.parameters, report.trainable) == (52, 0)


def test_tied_weights_count_once() -> None:
    model = TiedLm()
    report = lk.attach(model, lk.LoRA(r=2), ["body"])
    assert report.base_parameters == 11 * 6 + 6 * 6 + 6


# ---- defaults -----------------------------------------------------------------------------------------------------
def test_the_default_name_and_targets() -> None:
    report = lk.attach(Mlp(), lk.LoRA(r=2))
    assert report.name == "default"
    assert [s.path for s in report.sites] == ["fc1", "fc2"]


def test_each_method_has_its_default_targets() -> None:
    biases = lk.attach(Mlp(), lk.BitFit())
    assert [s.path for s in biases.sites] == ["fc1.bias", "norm.bias", "fc2.bias"]
    everything = lk.attach(Mlp(), lk.FullFineTuning())
    assert [s.path for s in everything.sites] == [n for n, _ in Mlp().named_parameters()]


@pytest.mark.parametrize(
    ("base", "given", "want"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_dtype_of_the_adapter(base: torch.dtype, given: torch.dtype | None, want: torch.dtype) -> None:
    model = Mlp().to(base)
    lk.attach(model, lk.LoRA(r=2), dtype=given)
    assert {p.dtype for p in lk.trainable(model).values()} == {want}


def test_a_state_keeps_its_dtype() -> None:
    model = Mlp()
    lk.attach(model, lk.LoRA(r=2))
    half = lk.extract(model).to(torch.bfloat16)
    other = Mlp()
    lk.attach(other, half)
    assert {t.dtype for group in lk.extract(other).tensors.values() for t in group.values()} == {
        torch.bfloat16
    }
    third = Mlp()
    lk.attach(third, half, dtype=torch.float32)
    assert {t.dtype for group in lk.extract(third).tensors.values() for t in group.values()} == {
        torch.float32
    }


def test_the_seed_decides_the_start_and_leaves_torchs_generator_alone() -> None:
    a, b = Mlp(), Mlp()
    lk.attach(a, lk.LoRA(r=2), seed=3)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    lk.attach(b, lk.LoRA(r=2), seed=3)
    assert torch.equal(before, torch.get_rng_state())
    for one, two in zip(lk.trainable(a).values(), lk.trainable(b).values(), strict=True):
        assert torch.equal(one, two)


def test_the_output_is_unchanged_bit_for_bit_at_the_start() -> None:
    model = Mlp()
    before = model(X)
    lk.attach(model, lk.LoRA(r=2))
    assert torch.equal(model(X), before)


# ---- freezing and training ----------------------------------------------------------------------------------------
def test_the_base_is_frozen_and_only_the_adapter_gets_gradients() -> None:
    model = Mlp()
    lk.attach(model, lk.LoRA(r=2), name="sql")
    assert set(lk.trainable(model)) == {
        f"{layer}.lorakit.output.sql.{factor}" for layer in ("fc1", "fc2") for factor in ("lora_A", "lora_B")
    }
    fill(model)
    model(X).sum().backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == set(lk.trainable(model))


def test_freeze_false_leaves_every_flag() -> None:
    model = Mlp()
    model.fc1.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    lk.attach(model, lk.LoRA(r=2), freeze=False)
    assert {n: p.requires_grad for n, p in model.named_parameters() if "lorakit" not in n} == flags


def test_trainable_says_whether_the_adapter_requires_a_gradient() -> None:
    model = Mlp()
    lk.attach(model, lk.LoRA(r=2), trainable=False)
    assert lk.trainable(model) == {}
    other = Mlp()
    lk.attach(other, lk.extract(model), trainable=True)
    assert len(lk.trainable(other)) == 4


def test_a_second_adapter_leaves_the_first_ones_flags() -> None:
    model = Mlp()
    lk.attach(model, lk.LoRA(r=2), name="a")
    lk.attach(model, lk.LoRA(r=2), name="b", trainable=False)
    assert all(".a." in name for name in lk.trainable(model))
    assert len(lk.trainable(model)) == 4


def test_training_a_state_does_not_write_to_the_state() -> None:
    model = with_adapters(Mlp(), "a")
    state = lk.extract(model, "a")
    kept = {p: {k: t.clone() for k, t in g.items()} for p, g in state.tensors.items()}
    other = Mlp()
    lk.attach(other, state, trainable=True)
    with torch.no_grad():
        for parameter in lk.trainable(other).values():
            parameter.add_(1)
    assert all(torch.equal(state.tensors[p][k], kept[p][k]) for p in kept for k in kept[p])
    lk.extract(other).tensors["fc1"][
        "lora_A"
    ].zero_()  # nor does writing to what was extracted reach the model
    assert lk.extract(other).tensors["fc1"]["lora_A"].abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
def test_the_adapter_takes_the_mode_of_its_layer(training: bool) -> None:
    model = Mlp().train(training)
    lk.attach(model, lk.LoRA(r=2, dropout=0.5))
    assert {m.training for m in model.modules()} == {training}


def test_the_mode_of_each_layer_counts_where_they_differ() -> None:
    model = Mlp().train()
    model.fc1.eval()
    lk.attach(model, lk.LoRA(r=2, dropout=0.5))
    assert {m.training for m in model.fc1.modules()} == {False}
    assert {m.training for m in model.fc2.modules()} == {True}


def test_attaching_in_inference_mode_still_gives_a_model_that_can_be_trained() -> None:
    model = Mlp()
    with torch.inference_mode():
        lk.attach(model, lk.LoRA(r=2))
        lk.attach(model, lk.TokenRows((0,)), ["fc1"], name="rows")
        lk.merge(model, "rows")
        lk.unmerge(model)
    model(X).sum().backward()
    assert all(p.grad is not None for n, p in lk.trainable(model).items() if "default" in n)


# ---- several methods in one adapter -------------------------------------------------------------------------------
def test_a_mapping_gives_targets_different_methods_and_a_later_key_wins() -> None:
    model = Mlp()
    report = lk.attach(
        model, {"all-linear": lk.LoRA(r=2), "fc2": lk.DoRA(lk.LoRA(r=3)), "norm": lk.FullFineTuning()}
    )
    assert {s.path: s.method for s in report.sites} == {
        "fc1": "lora", "fc2": "dora", "norm.weight": "full", "norm.bias": "full",
    }  # fmt: skip


def test_a_key_of_a_mapping_may_be_several_names_or_an_expression_which_are_resolved_together() -> None:
    model = Mlp()
    lora = lk.LoRA(r=2, rank_pattern={"fc2": 1})  # the pattern must match one of the names, not each
    lk.attach(model, {("fc1", "fc2"): lora, re.compile(r".*1\.bias"): lk.FullFineTuning()})
    methods = lk.extract(model).spec.methods
    assert {path: m.name for path, m in methods.items()} == {"fc1": "lora", "fc2": "lora", "fc1.bias": "full"}
    assert (methods["fc1"].r, methods["fc2"].r) == (2, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", [1, (1, 2), re.compile(b"fc1"), re.compile("FC1", re.IGNORECASE)])
def test_keys_that_mean_nothing(key: Any) -> None:
    with pytest.raises(TargetError, match=r"keys are presets|Write the flags"):
        lk.attach(Mlp(), {key: lk.LoRA(r=2)})
    lk.attach(Mlp(), {re.compile("(?i)FC1"): lk.LoRA(r=2)})


def test_an_exclusion_holds_for_a_mapping_as_a_whole() -> None:
    report = lk.attach(
        Mlp(), {"all-linear": lk.LoRA(r=2), "norm": lk.FullFineTuning()}, exclude=["fc1", "norm.bias"]
    )
    assert [s.path for s in report.sites] == ["fc2", "norm.weight"]


def test_both_biases_of_a_layer_at_once_merge_to_the_same_output() -> None:
    model = Mlp()
    lk.attach(model, {"all-linear": lk.LoRA(r=2, bias=True), "all-bias": lk.BitFit()})
    fill(model)
    unmerged = model(X)
    lk.merge(model)
    torch.testing.assert_close(model(X), unmerged)
    lk.unmerge(model)
    assert torch.equal(model(X), unmerged)


def test_a_root_that_is_itself_the_layer() -> None:
    layer = nn.Linear(6, 4)
    before = picture(layer)
    assert lk.attach(layer, lk.LoRA(r=2)).sites[0].path == ""
    fill(layer)
    unmerged = layer(X)
    lk.merge(layer)
    torch.testing.assert_close(layer(X), unmerged)
    lk.detach(layer)
    assert picture(layer) == before


# ---- a failing attach changes nothing -----------------------------------------------------------------------------
class Odd(nn.Module):
    """Has layers that cannot be adapted, beside one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.bag = nn.EmbeddingBag(5, 6)
        self.up = nn.ConvTranspose1d(4, 4, 3)
        self.codes = nn.Linear(4, 4)
        self.codes.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        self.table = nn.ParameterList([nn.Parameter(torch.zeros(3, 3))])


def _state(**change: Any) -> lk.AdapterState:
    model = nn.ModuleDict(
        {"fc1": nn.Linear(6, change.get("out", 8)), change.get("second", "fc2"): nn.Linear(8, 4)}
    )
    lk.attach(model, lk.LoRA(r=2))
    return lk.extract(model)


def _state_from_both_sides() -> lk.AdapterState:
    """DoRA through the layer's output and a copy of its weight, as a file can have them; a mapping takes the later."""
    states = []
    for method, target in ((lk.DoRA(lk.LoRA(r=2)), "fc1"), (lk.FullFineTuning(), "fc1.weight")):
        model = Mlp()
        lk.attach(model, method, [target])
        states.append(lk.extract(model))
    spec = lk.AdapterSpec(
        {**states[0].spec.methods, **states[1].spec.methods},
        {**states[0].spec.shapes, **states[1].spec.shapes},
    )
    return lk.AdapterState(spec, {**states[0].tensors, **states[1].tensors})


BAD: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no match": (Mlp, (lk.LoRA(r=2), ["q_proj"]), {}, UnmatchedTargetError, "'q_proj' matches nothing"),
    "one entry unmatched": (Mlp, (lk.LoRA(r=2), ["fc1", "fc3"]), {}, UnmatchedTargetError, "Did you mean"),
    "regex unmatched": (Mlp, (lk.LoRA(r=2), "layers.*"), {}, UnmatchedTargetError, "matches nothing"),
    "regex broken": (Mlp, (lk.LoRA(r=2), "fc("), {}, ConfigError, "not a regular expression"),
    "name where a regex is meant": (nn.Sequential, (lk.LoRA(r=2), "fc1"), {}, UnmatchedTargetError, "matches nothing"),
    "preset misspelt": (Mlp, (lk.LoRA(r=2), "all_linear"), {}, UnmatchedTargetError, "all-linear"),
    "callable chooses none": (Mlp, (lk.LoRA(r=2), lambda path, module: False), {}, UnmatchedTargetError, "none"),
    "exclude unmatched": (Mlp, (lk.LoRA(r=2),), {"exclude": ["fc3"]}, UnmatchedTargetError, "fc3"),
    "all excluded": (
        Mlp, (lk.LoRA(r=2), ["fc1", "fc2"]), {"exclude": ["fc1", "fc2"]}, UnmatchedTargetError, "leaves none",
    ),
    "rank too large": (Mlp, (lk.LoRA(r=7),), {}, ConfigError, "at most 6"),
    "rank too large at the last target": (Mlp, (lk.LoRA(r=5),), {}, ConfigError, "'fc2'"),
    "rank pattern unmatched": (Mlp, (lk.LoRA(r=2, rank_pattern={"fc9": 1}),), {}, UnmatchedTargetError, "fc9"),
    "norm is no layer": (Mlp, (lk.LoRA(r=2), ["norm"]), {}, UnsupportedTargetError, "FullFineTuning"),
    "block is no layer": (lambda: nn.Sequential(Mlp()), (lk.LoRA(r=2), ["0"]), {}, UnsupportedTargetError, "fc1"),
    "embedding bag": (Odd, (lk.LoRA(r=2), ["fc", "bag"]), {}, UnsupportedTargetError, "EmbeddingBag"),
    "transposed convolution": (Odd, (lk.LoRA(r=2), ["fc", "up"]), {}, UnsupportedTargetError, "transposed"),
    "integer weight": (Odd, (lk.LoRA(r=2), ["fc", "codes"]), {}, UnsupportedTargetError, "int8"),
    "parameter list": (Odd, (lk.LoRA(r=2), ["fc", "table.0"]), {}, UnsupportedTargetError, "module of its own"),
    "dropout on a bare parameter": (
        lambda: nn.MultiheadAttention(8, 2), (lk.LoRA(r=2, dropout=0.1), ["in_proj_weight"]), {},
        UnsupportedTargetError, "dropout=0",
    ),
    "empty name": (Mlp, (lk.LoRA(r=2),), {"name": ""}, AdapterNameError, "name"),
    "dotted name": (Mlp, (lk.LoRA(r=2),), {"name": "a.b"}, AdapterNameError, "dots"),
    "name with a slash": (Mlp, (lk.LoRA(r=2),), {"name": "../a"}, AdapterNameError, "slashes"),
    "no name": (Mlp, (lk.LoRA(r=2),), {"name": None}, AdapterNameError, "None"),
    "integer dtype": (Mlp, (lk.LoRA(r=2),), {"dtype": torch.int32}, ConfigError, "floating-point"),
    "method misspelt": (Mlp, ("lora",), {}, TargetError, "AdapterState"),
    "the class and not a method": (Mlp, (lk.LoRA,), {}, TargetError, "AdapterState"),
    "empty mapping": (Mlp, ({},), {}, TargetError, "empty"),
    "mapping to a word": (Mlp, ({"fc1": lk.LoRA(r=2), "fc2": "lora"},), {}, TargetError, "'lora'"),
    "mapping with an unmatched key": (
        Mlp, ({"fc1": lk.LoRA(r=2), "fc9": lk.LoRA(r=2)},), {}, UnmatchedTargetError, "fc9",
    ),
    "mapping and targets": (Mlp, ({"fc1": lk.LoRA(r=2)}, ["fc1"]), {}, TargetError, "no targets"),
    "one weight from two sides": (
        Mlp, (_state_from_both_sides(),), {},
        UnsupportedTargetError, "on the base weight alone",
    ),
    "token outside the table": (TiedLm, (lk.TokenRows((11,)), ["embed"]), {}, UnsupportedTargetError, "outside"),
    "state of another size": (Mlp, (_state(out=9),), {}, (AdapterMismatchError, AdapterFileError), "9 x 6"),
    "state of another model": (Mlp, (_state(second="fc3"),), {}, AdapterMismatchError, "fc3"),
    "state and targets": (Mlp, (_state(), ["fc1"]), {}, TargetError, "AdapterState"),
    "state and seed": (Mlp, (_state(),), {"seed": 1}, TargetError, "seed"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("carrying", [False, True], ids=["bare", "carrying"])
def test_a_failing_attach_leaves_everything_as_it_was(case: str, carrying: bool) -> None:
    make, args, kwargs, error, message = BAD[case]
    model = make()
    if carrying:
        model.extra = nn.Linear(3, 3)
        lk.attach(model, lk.LoRA(r=1), ["extra"], name="first")
        fill(model)
    before = picture(model)
    with pytest.raises(error, match=f"(?s){message}"):
        lk.attach(model, *args, **kwargs)
    assert picture(model) == before


def test_a_name_that_is_taken_is_refused() -> None:
    model = with_adapters(Mlp(), "a")
    before = picture(model)
    with pytest.raises(AdapterNameError, match=r"'a' is already attached.*detach"):
        lk.attach(model, lk.LoRA(r=2), name="a")
    assert picture(model) == before


def test_a_second_root_above_or_below_is_refused() -> None:
    inner = with_adapters(Mlp(), "a")
    outer = nn.Sequential(inner)
    before = picture(inner)
    with pytest.raises(AdapterNameError, match="'0' inside this Sequential"):
        lk.attach(outer, lk.LoRA(r=2), name="b")
    with pytest.raises(AdapterNameError, match="contains it"):
        lk.attach(inner.fc1, lk.LoRA(r=2), name="b")
    assert picture(inner) == before


def test_a_fresh_adapter_on_merged_weights_is_refused_and_an_additive_state_is_not() -> None:
    model = with_adapters(Mlp(), "a")
    state = lk.extract(with_adapters(Mlp(), "x"), "x")
    dora = lk.extract(with_adapters(Mlp(), "x", method=lk.DoRA(lk.LoRA(r=2))), "x")
    lk.merge(model, "a")
    before = picture(model)
    with pytest.raises(MergeError, match="unmerge"):
        lk.attach(model, lk.LoRA(r=2), name="b")
    with pytest.raises(MergeError, match="DoRA"):
        lk.attach(model, dora, name="b")
    assert picture(model) == before
    lk.attach(model, state, name="b")
    with lk.use(model, ["a", "b"]):
        beside = model(X)
    lk.unmerge(model)
    with lk.use(model, ["a", "b"]):
        torch.testing.assert_close(model(X), beside)


def test_the_same_formula_from_two_sides_is_refused_also_for_a_later_adapter() -> None:
    model = with_adapters(Mlp(), "full", method=lk.FullFineTuning(), targets=["fc1"])
    before = picture(model)
    with pytest.raises(UnsupportedTargetError, match="on the base weight alone"):
        lk.attach(model, lk.DoRA(lk.LoRA(r=2)), ["fc1"], name="dora")
    assert picture(model) == before
    lk.attach(model, lk.LoRA(r=2), ["fc1"], name="lora")  # an additive change from the other side adds up
    fill(model, "lora", seed=5)
    with lk.use(model, ["full", "lora"]):
        both = model(X)
    lk.merge(model, ["full", "lora"])
    torch.testing.assert_close(model(X), both)


# ---- what a user's own habits must not break ----------------------------------------------------------------------
def test_hooks_that_the_user_registered_before_and_after_see_the_adapted_output() -> None:
    model = Mlp()
    seen: list[tuple[str, torch.Tensor]] = []
    model.fc1.register_forward_hook(lambda m, i, o: seen.append(("before", o)))
    with_adapters(model, "a")
    model.fc1.register_forward_hook(lambda m, i, o: seen.append(("after", o)))
    with torch.no_grad():
        adapted = model.fc1(X)
    assert [who for who, _ in seen] == ["before", "after"]
    assert all(torch.equal(o, adapted) for _, o in seen)
    lk.detach(model)
    assert len(model.fc1._forward_hooks) == 2


def test_an_output_that_an_earlier_hook_kept_is_not_written_to() -> None:
    model = with_adapters(Mlp(), "a")
    base = torch.nn.functional.linear(X, model.fc1.weight, model.fc1.bias)
    kept: list[torch.Tensor] = []
    first = model.fc1.register_forward_hook(lambda m, i, o: kept.append(o), prepend=True)
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: kept.append(o) if m is model.fc1 else None
    )
    try:
        with torch.no_grad():
            model.fc1(X)
        model.fc1(X)
    finally:
        first.remove()
        everywhere.remove()
    assert len(kept) == 4
    assert all(torch.equal(o, base) for o in kept)


def test_an_output_that_a_hook_replaced_is_not_written_to() -> None:
    model = with_adapters(Mlp(), "a")
    patch = torch.zeros(5, 8)  # activation patching: the same tensor is returned in every call
    model.fc1.register_forward_hook(lambda m, i, o: patch, prepend=True)
    with torch.no_grad():
        first, second = model(X), model(X)
    assert torch.equal(patch, torch.zeros(5, 8))
    assert torch.equal(first, second)


def test_an_output_that_a_patched_forward_keeps_is_not_written_to() -> None:
    model = with_adapters(Mlp(), "a")
    cache = torch.zeros(5, 8)
    model.fc1.forward = lambda x: cache  # type: ignore[method-assign]
    with torch.no_grad():
        model.fc1(X)
    assert torch.equal(cache, torch.zeros(5, 8))


def test_an_autograd_user_of_the_base_output_is_not_disturbed() -> None:
    model = with_adapters(Mlp(), "a")
    model.fc1.register_forward_hook(
        lambda m, i, o: torch.nn.functional.gelu(o), prepend=True
    )  # saves its input
    model.fc1.weight.requires_grad_(True)
    model(X).sum().backward()
    assert model.fc1.weight.grad is not None


def test_a_layer_called_with_a_keyword() -> None:
    model = with_adapters(Mlp(), "a")
    assert torch.equal(model.fc1(input=X), model.fc1(X))


def test_a_shared_module_carries_one_adapter_and_acts_at_every_call() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    model.append(model[0])  # the same object twice
    before = picture(model)
    assert [s.path for s in lk.attach(model, lk.LoRA(r=2)).sites] == ["0"]
    fill(model)
    layer = model[0]
    adapter = layer.lorakit.output.default
    W = layer.weight + 8.0 * adapter.lora_B @ adapter.lora_A
    want = torch.tanh(X @ W.T + layer.bias) @ W.T + layer.bias
    torch.testing.assert_close(model(X), want)
    lk.merge(model)
    torch.testing.assert_close(model(X), want)
    lk.detach(model)
    assert picture(model) == before


def test_two_modules_that_share_a_parameter_carry_an_adapter_each() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    with_adapters(model, "a")
    unmerged = model(X)
    lk.merge(model)
    torch.testing.assert_close(model(X), unmerged)
    lk.detach(model)
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_gives_the_same_output(mode: Any) -> None:
    model = with_adapters(Mlp(), "a")
    want = model(X).detach()
    with mode():
        assert torch.equal(model(X), want)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(6),
        torch.randn(0, 6),
        torch.randn(2, 0, 6),
        torch.randn(2, 3, 4, 6),
        torch.randn(6, 5).T,
        torch.randn(3, 6, 2).mT,
        torch.randn(5, 12)[:, ::2],
        torch.randn(1, 6).expand(5, 6),
        torch.randn(5, 6, requires_grad=True),
    ],
    ids=[
        "1-D",
        "empty",
        "empty middle",
        "4-D",
        "transposed",
        "strided 3-D",
        "step",
        "expanded",
        "requires grad",
    ],
)
def test_inputs_of_every_layout(x: torch.Tensor) -> None:
    model = with_adapters(Mlp(), "a")
    adapter = model.fc1.lorakit.output.a
    W = model.fc1.weight + 8.0 * adapter.lora_B @ adapter.lora_A
    want = x @ W.T + model.fc1.bias
    torch.testing.assert_close(model.fc1(x), want)
    with torch.no_grad():
        torch.testing.assert_close(model.fc1(x), want)
    if x.requires_grad:
        (got,) = torch.autograd.grad(model.fc1(x).pow(2).sum(), x)
        torch.testing.assert_close(got, torch.autograd.grad(want.pow(2).sum(), x)[0])


def test_an_empty_batch_through_a_convolution() -> None:
    model = with_adapters(nn.Sequential(nn.Conv1d(3, 4, 3)), "a", targets=["0"])
    assert model(torch.randn(0, 3, 7)).shape == (0, 4, 5)


def test_half_precision_models_run_and_stay_half() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = with_adapters(Mlp().to(dtype), "a")
        assert model(X.to(dtype)).dtype == dtype
        model(X.to(dtype)).sum().backward()
        assert {p.grad.dtype for p in lk.trainable(model).values() if p.grad is not None} == {torch.float32}


def test_autocast_gives_the_dtype_that_the_base_gives() -> None:
    for method in (lk.LoRA(r=2), lk.DoRA(lk.LoRA(r=2))):
        model = with_adapters(Mlp(), "a", method=method)
        want = model(X)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(X)
        got.float().sum().backward()
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, atol=0.05, rtol=0.05)


def test_function_transforms_see_through_the_adapters() -> None:
    model = with_adapters(Mlp(), "a")
    parameters = dict(model.named_parameters())
    trained = {n: p for n, p in parameters.items() if "lorakit" in n}

    def loss(trained: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {**parameters, **trained}, (x,)).pow(2).sum()

    whole = torch.func.grad(loss)(trained, X)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, X)  # gradients of each example
    loss(trained, X).backward()
    for name, p in trained.items():
        torch.testing.assert_close(whole[name], p.grad)
        torch.testing.assert_close(each[name].sum(0), p.grad)
    direction = torch.ones_like(X)
    _, slope = torch.func.jvp(model, (X,), (direction,))
    step = 1e-3
    torch.testing.assert_close(
        slope, (model(X + step * direction) - model(X - step * direction)) / (2 * step), atol=1e-2, rtol=1e-2
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, direction)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent, slope)


def test_several_adapters_values_at_once_through_vmap() -> None:
    model = with_adapters(Mlp(), "a")
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    stacked = {n: torch.stack([p, 2 * p]) if "lorakit" in n else p for n, p in parameters.items()}
    dims = {n: 0 if "lorakit" in n else None for n in parameters}
    run = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (X,)), in_dims=(dims,))
    first = run(stacked)[0]
    torch.testing.assert_close(first, model(X))


# ---- copies, state dicts, optimizers, memory ----------------------------------------------------------------------
def test_a_deep_copy_is_independent() -> None:
    model = with_adapters(Mlp(), "a", "b")
    other = copy.deepcopy(model)
    want = model(X)
    fill(other, "a", seed=9)
    lk.set_active(other, "b")
    assert torch.equal(model(X), want)
    with lk.use(model, "b"):
        torch.testing.assert_close(model(X), other(X))
    with lk.use(model, None):
        torch.testing.assert_close(other(X), other(X))
    lk.detach(other)
    assert torch.equal(model(X), want)
    assert picture(copy.deepcopy(other))["report"] is None


def test_a_deep_copy_made_inside_use_is_in_nobodys_block() -> None:
    model = with_adapters(Mlp(), "a", "b")
    want = model(X)
    with lk.use(model, "b"):
        other = copy.deepcopy(model)
        assert torch.equal(other(X), want)
        lk.merge(other, "a")  # no block of its own is open
    assert torch.equal(model(X), want)


def test_a_deep_copied_sub_module_runs_and_points_at_itself() -> None:
    model = with_adapters(Mlp(), "a")
    part = copy.deepcopy(model.fc1)
    want = model.fc1(X)
    assert torch.equal(part(X), want)
    with torch.no_grad():
        part.weight.zero_()
        part.lorakit.output.a.lora_B.zero_()
    assert torch.equal(model.fc1(X), want)
    assert torch.equal(part(X), part.bias.expand(5, 8))


def test_pickle_keeps_adapters_and_a_new_hook_cannot_displace_one() -> None:
    model = with_adapters(Mlp(), "a", "b")
    counter = torch.utils.hooks.RemovableHandle
    data, now = pickle.dumps(model), counter.next_id
    try:
        counter.next_id = 0  # as in a new process
        other = pickle.loads(data)
        for layer in (other.fc1, other.fc2):
            for _ in range(4):
                layer.register_forward_hook(lambda *_: None)
        assert torch.equal(other(X), model(X))
    finally:
        counter.next_id = max(now, counter.next_id)


def test_a_state_dict_goes_round_strictly_while_attached_and_while_merged() -> None:
    source, target = with_adapters(Mlp(), "a"), with_adapters(Mlp(), "a")
    fill(target, seed=8)
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(source(X), target(X))
    lk.merge(source)
    lk.merge(target)
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(source(X), target(X))
    assert list(source.state_dict()) == list(target.state_dict())


def test_base_keys_keep_their_names_and_order() -> None:
    model = Mlp()
    base = list(model.state_dict())
    with_adapters(model, "a")
    assert [k for k in model.state_dict() if ".lorakit." not in k] == base
    assert isinstance(model.fc1, nn.Linear)
    assert type(model.fc1) is nn.Linear


def test_an_optimizer_keeps_its_state_over_switches_and_merges() -> None:
    model = with_adapters(Mlp(), "a", "b")
    parameters = list(lk.trainable(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model(X).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    lk.set_active(model, "b")
    lk.merge(model, "b")
    lk.unmerge(model)
    lk.set_active(model, "a")
    assert [id(p) for p in lk.trainable(model).values()] == [id(p) for p in parameters]
    before = model(X).detach()
    model(X).sum().backward()
    optimizer.step()
    stepped = {
        n: int(optimizer.state[p]["step"]) for n, p in lk.trainable(model).items() if p in optimizer.state
    }
    assert set(stepped.values()) == {2}
    assert all(".a." in n for n in stepped)
    assert not torch.equal(model(X), before)


def test_to_moves_the_adapter_with_the_model() -> None:
    model = with_adapters(Mlp(), "a").to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(X.double()).dtype == torch.float64


def test_attaching_on_the_meta_device_counts_without_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10_000, 10_000), nn.Embedding(50_000, 10_000))
    report = lk.attach(model, lk.LoRA(r=4), ["0", "1"])
    assert report.parameters == 4 * 20_000 + 4 * 60_000
    assert {p.device.type for p in lk.trainable(model).values()} == {"meta"}


def test_a_later_entry_of_a_mapping_replaces_the_choice_of_the_same_weight() -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    lk.attach(model, {"all-linear": lk.LoRA(r=2), "q": lk.FullFineTuning()})
    methods = {site.path: site.method for site in lk.report(model).adapters[0].sites}
    assert methods == {"k": "lora", "q.weight": "full", "q.bias": "full"}
    with pytest.raises(TargetError, match="keys"):
        lk.attach(model, {1: lk.LoRA(r=2)}, name="b")  # type: ignore[dict-item]
