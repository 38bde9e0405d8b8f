"""Merging: equal to unmerged, undone to the last bit, refused with a reason when it cannot be right."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterNameError, MergeError, NotAttachedError
from tests.attach.small_models import (
    Mlp,
    TiedLm,
    bits,
    fill,
    names_of,
    picture,
    same_values,
    values,
    with_adapters,
)

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(11, (4, 3), generator=torch.Generator().manual_seed(0))


# ---- right --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "route",
    ["a", ["a", "b"], {"a": 0.7, "b": -0.3}, {"b": 2.0}],
    ids=["one", "two", "weighted", "one weighted"],
)
def test_merged_computes_what_use_computes(route: Any) -> None:
    model = with_adapters(Mlp().double(), "a", "b")
    with lk.use(model, route):
        unmerged = model(X.double())
    lk.merge(model, route)
    torch.testing.assert_close(model(X.double()), unmerged, atol=1e-12, rtol=0)


def test_the_active_adapters_are_merged_by_default() -> None:
    model = with_adapters(Mlp(), "a", "b")
    lk.set_active(model, {"a": 0.5, "b": 1})
    unmerged = model(X)
    lk.merge(model)
    assert lk.report(model).merged == {"a": 0.5, "b": 1.0}
    torch.testing.assert_close(model(X), unmerged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_unmerging_restores_every_bit_and_every_object(dtype: torch.dtype) -> None:
    model = with_adapters(Mlp().to(dtype), "a", "b")
    before = picture(model)
    for _ in range(3):
        lk.merge(model, ["a", "b"])
        lk.unmerge(model)
    assert picture(model) == before


def test_the_new_weight_is_rounded_once() -> None:
    layer = with_adapters(nn.Linear(64, 64).to(torch.bfloat16), "a")
    adapter = layer.lorakit.output.a
    exact = torch.addmm(layer.weight.float(), adapter.lora_B, adapter.lora_A, alpha=8.0)
    lk.merge(layer)
    assert torch.equal(layer.weight, exact.to(torch.bfloat16))


def test_the_order_of_names_does_not_matter() -> None:
    one, two = (with_adapters(Mlp(), "a", "b") for _ in range(2))
    two.load_state_dict(one.state_dict())
    lk.merge(one, ["a", "b"])
    lk.merge(two, ["b", "a"])
    assert bits(one.fc1.weight) == bits(two.fc1.weight)


def test_merging_touches_no_flag_and_no_mode() -> None:
    model = with_adapters(Mlp(), "a")
    model.fc1.eval()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    lk.merge(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert [m.training for m in model.modules()] == modes


def test_a_bias_of_the_adapter_lands_in_a_bias_and_leaves_none_behind() -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4))
    lk.attach(model, lk.LoRA(r=2, bias=True))
    fill(model)
    before = picture(model)
    unmerged = model(X)
    lk.merge(model)
    assert model[0].bias is not None
    torch.testing.assert_close(model(X), unmerged)
    lk.unmerge(model)
    assert picture(model) == before


def test_a_rest_of_the_default_goes_on_acting() -> None:
    model = with_adapters(Mlp(), "a", "b")
    lk.set_active(model, ["a", "b"])
    both = model(X)
    lk.merge(model, "a")
    assert (lk.report(model).merged, lk.report(model).active) == ({"a": 1.0}, {"a": 1.0, "b": 1.0})
    torch.testing.assert_close(model(X), both)
    lk.unmerge(model)
    assert torch.equal(model(X), both)


def test_merging_another_than_the_default_makes_it_act_until_it_is_unmerged() -> None:
    model = with_adapters(Mlp(), "a", "b")
    with lk.use(model, "b"):
        want = model(X)
    lk.merge(model, "b")
    torch.testing.assert_close(model(X), want)
    lk.unmerge(model)
    assert lk.report(model).active == {"a": 1.0}


# ---- refused ------------------------------------------------------------------------------------------------------
def _nan(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("fc2.lorakit.output.a.lora_B")[0, 0] = float("nan")


def _huge(model: nn.Module) -> None:
    model.half()
    with torch.no_grad():
        model.get_parameter("fc2.lorakit.output.a.lora_B").fill_(3e4)


def _huge_bias(model: nn.Module) -> None:
    lk.attach(model, lk.LoRA(r=2, bias=True, alpha=2), ["fc1"], name="bias")
    model.fc1.half()
    with torch.no_grad():
        model.get_parameter("fc1.lorakit.output.bias.lora_bias").data = torch.full((8,), 7e4)


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], Any, type[Exception], str]] = {
    "unknown": (lambda m: None, "sql", AdapterNameError, "'sql'"),
    "one of two unknown": (lambda m: None, ["a", "sql"], AdapterNameError, "'sql'"),
    "merged already": (lambda m: lk.merge(m, "a"), "b", MergeError, r"a is merged already.*unmerge"),
    "the same again": (lambda m: lk.merge(m, "a"), "a", MergeError, "merged already"),
    "nothing active": (lambda m: lk.set_active(m, None), None, MergeError, "no adapter is active"),
    "an empty list": (lambda m: None, [], MergeError, "Nothing to merge"),
    "NaN": (_nan, "a", MergeError, r"'a' holds a NaN or an infinity in fc2:lora_B"),
    "NaN beside a sound one": (_nan, ["a", "b"], MergeError, "NaN"),
    "overflow": (_huge, "a", MergeError, r"'fc2' as torch.float16"),
    "overflow of a bias": (_huge_bias, "bias", MergeError, r"'fc1.bias' as torch.float16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_merge_leaves_everything_as_it_was(case: str) -> None:
    prepare, names, error, message = REFUSED[case]
    model = with_adapters(Mlp(), "a", "b")
    prepare(model)
    before = picture(model)
    with pytest.raises(error, match=f"(?s){message}"):
        lk.merge(model, names)
    assert picture(model) == before


def test_merging_and_unmerging_inside_a_block_are_refused() -> None:
    model = with_adapters(Mlp(), "a", "b")
    before = picture(model)
    with lk.use(model, "b"), pytest.raises(MergeError, match="outside"):
        lk.merge(model, "b")
    assert picture(model) == before
    lk.merge(model, "b")
    merged = picture(model)
    with lk.use(model, "b"), pytest.raises(MergeError, match="outside"):
        lk.unmerge(model)
    assert picture(model) == merged


def test_unmerging_what_is_not_merged() -> None:
    with pytest.raises(MergeError, match="Nothing is merged"):
        lk.unmerge(with_adapters(Mlp(), "a"))
    with pytest.raises(NotAttachedError):
        lk.unmerge(Mlp())


def test_a_default_that_is_measured_from_the_base_must_be_merged_as_well() -> None:
    model = with_adapters(Mlp(), "a")
    with_adapters(model, "d", method=lk.DoRA(lk.LoRA(r=2)))
    lk.set_active(model, ["a", "d"])
    both = model(X)
    before = picture(model)
    with pytest.raises(MergeError, match=r"'d' \(DoRA\).*together"):
        lk.merge(model, ["a"])
    assert picture(model) == before
    lk.merge(model)
    torch.testing.assert_close(model(X), both)


def test_running_out_of_memory_half_way_puts_back_what_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.targets.dense import DenseStorage

    model = with_adapters(Mlp(), "a", "b")
    before = picture(model)
    store = DenseStorage.store

    def fails_at_the_second(self: DenseStorage, module: nn.Module, name: str, value: torch.Tensor) -> None:
        if module is model.fc2:
            raise MemoryError
        store(self, module, name, value)

    monkeypatch.setattr(DenseStorage, "store", fails_at_the_second)
    with pytest.raises(MemoryError):
        lk.merge(model)
    assert picture(model) == before


# ---- permanent ----------------------------------------------------------------------------------------------------
def test_a_permanent_merge_leaves_a_plain_model() -> None:
    model = with_adapters(Mlp(), "a")
    unmerged = model(X)
    lk.merge(model, permanent=True)
    torch.testing.assert_close(model(X), unmerged)
    assert names_of(model) == []
    assert list(model.state_dict()) == list(Mlp().state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or "lorakit" in m._modules for m in model.modules())


def test_a_permanent_merge_keeps_the_other_adapters() -> None:
    model = with_adapters(Mlp(), "a", "b")
    with lk.use(model, ["a", "b"]):
        both = model(X)
    lk.merge(model, "a", permanent=True)
    assert names_of(model) == ["b"]
    assert lk.report(model).active == {}
    lk.set_active(model, "b")
    torch.testing.assert_close(model(X), both)
    lk.merge(model)
    lk.unmerge(model)
    torch.testing.assert_close(model(X), both)


def test_a_permanent_merge_frees_the_old_weights_and_a_plain_one_keeps_them() -> None:
    model = with_adapters(Mlp(), "a")
    old = weakref.ref(model.fc1.weight)
    lk.merge(model)
    gc.collect()
    assert old() is not None
    lk.unmerge(model)
    assert model.fc1.weight is old()
    lk.merge(model, permanent=True)
    gc.collect()
    assert old() is None


def test_unmerging_frees_the_merged_weights() -> None:
    model = with_adapters(Mlp(), "a")
    lk.merge(model)
    merged = weakref.ref(model.fc1.weight)
    lk.unmerge(model)
    gc.collect()
    assert merged() is None


# ---- copies, moves and writes while merged ------------------------------------------------------------------------
def test_a_deep_copy_of_a_merged_model_unmerges_to_the_last_bit() -> None:
    model = with_adapters(Mlp().to(torch.bfloat16), "a")
    base = values(model)
    lk.merge(model)
    other = copy.deepcopy(model)
    lk.unmerge(other)
    assert same_values(other, base)
    assert not same_values(model, base)
    lk.unmerge(model)
    assert same_values(model, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_while_merged_unmerges_to_the_cast_base(dtype: torch.dtype) -> None:
    model = with_adapters(Mlp(), "a")
    base = {k: v.to(dtype) for k, v in values(model).items()}
    lk.merge(model)
    model.to(dtype)
    lk.unmerge(model)
    assert same_values(model, base)


def test_a_tied_model_that_was_cast_while_merged_is_tied_again() -> None:
    model = with_adapters(TiedLm(), "a", targets=["embed"])
    lk.merge(model)
    model.to(torch.bfloat16)
    lk.unmerge(model)
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.dtype == torch.bfloat16


def test_an_adapter_that_is_trained_on_while_merged_keeps_its_own_values() -> None:
    model = with_adapters(Mlp(), "a")
    lk.merge(model)
    fill(model, "a", seed=7)
    state = lk.extract(model, "a")
    lk.unmerge(model)
    other = Mlp()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lorakit" not in k})
    lk.attach(other, state)
    assert torch.equal(other(X), model(X))


# ---- tied weights -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "targets", [["embed"], ["head"], ["embed", "head"]], ids=["embedding", "head", "both"]
)
@pytest.mark.parametrize("method", [lk.LoRA(r=2), lk.DoRA(lk.LoRA(r=2))], ids=["lora", "dora"])
def test_a_tied_weight_is_merged_only_where_it_was_adapted(method: Any, targets: list[str]) -> None:
    model = with_adapters(TiedLm(), "a", method=method, targets=targets)
    tied = model.embed.weight
    unmerged = model(IDS)
    lk.merge(model)
    torch.testing.assert_close(model(IDS), unmerged)
    assert (model.embed.weight is tied, model.head.weight is tied) == (
        "embed" not in targets,
        "head" not in targets,
    )
    lk.unmerge(model)
    assert model.embed.weight is model.head.weight is tied
    assert torch.equal(model(IDS), unmerged)
    lk.merge(model, permanent=True)
    torch.testing.assert_close(model(IDS), unmerged)


def test_detaching_while_a_tied_weight_is_merged_restores_the_tie() -> None:
    model = TiedLm()
    before = picture(model)
    with_adapters(model, "a", targets=["embed", "body"])
    lk.merge(model)
    lk.detach(model)
    assert picture(model) == before


def test_what_is_chosen_while_merged_holds_after_unmerging() -> None:
    model = nn.ModuleDict({"l": nn.Linear(4, 4)})
    for name in ("a", "b"):
        lk.attach(model, lk.LoRA(r=2), targets=["l"], name=name)
    lk.merge(model, "a")
    lk.set_active(model, ["a", "b"])
    lk.unmerge(model)
    assert lk.report(model).active == {"a": 1.0, "b": 1.0}
