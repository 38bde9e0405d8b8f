"""Merging: the same function, and every bit back."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core import WeightMethod
from tests.contracts.pairs import TOLERANCE, Case, close, pairs

EVERY = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["64", "32", "bf16"]
)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert after[name].dtype is value.dtype
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["64", "32"])
@pairs(of=WeightMethod)
def test_the_merged_model_computes_the_same(setting: str, kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, dtype, training=False)
    case.attach(setting)
    before = case.model(case.x).detach()
    base = bits(case.model)
    expected = case.merged({"a": 1.0}) if case.kind.lossy else before
    lk.merge(case.model, "a")
    close(case.model(case.x), expected, TOLERANCE[dtype])
    assert any(not torch.equal(v, base[k]) for k, v in case.model.state_dict().items() if k in base)
    with lk.use(case.model, "a"):
        close(case.model(case.x), expected, TOLERANCE[dtype])
    with pytest.raises(lk.LorakitError, match="unmerge"):
        lk.use(case.model, None)


@EVERY
@pairs(of=WeightMethod)
def test_unmerging_restores_every_bit(setting: str, kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, dtype)
    case.attach(setting)
    y = case.model(case.x)
    before = bits(case.model)
    kept = dict(case.model.named_parameters())
    lk.merge(case.model, "a")
    twin = copy.deepcopy(case.model)
    lk.unmerge(case.model)
    assert_same_bits(case.model, before)
    assert all(p is kept[name] for name, p in case.model.named_parameters())
    assert torch.equal(case.model(case.x), y)
    lk.unmerge(twin)
    assert_same_bits(twin, before)
    assert torch.equal(twin(case.x), y)


@pairs(of=WeightMethod)
def test_a_mix_is_the_weighted_sum_of_changes_and_merges(setting: str, kind: str) -> None:
    case = Case(kind, training=False)
    case.attach(setting, "a")
    case.attach_partner(setting, "b")
    weights = {"a": 0.7, "b": 0.3}
    expected = case.expected(weights)
    with lk.use(case.model, weights):
        close(case.model(case.x), expected, 1e-12)
        with torch.no_grad():
            close(case.model(case.x), expected, 1e-12)
    before = bits(case.model)
    lk.merge(case.model, weights)
    close(case.model(case.x), case.merged(weights), 1e-12)
    lk.unmerge(case.model)
    assert_same_bits(case.model, before)


@pytest.mark.parametrize("weights", [{"a": -1.5}, {"a": 0.25}, {"a": 0.0}], ids=["negative", "part", "zero"])
@pairs(kinds=("linear", "embedding", "conv2d-groups", "experts", "hfconv1d-slice"), of=WeightMethod)
def test_one_adapter_with_a_weight(setting: str, kind: str, weights: dict[str, float]) -> None:
    case = Case(kind, training=False)
    case.attach(setting, "a")
    expected = case.expected(weights)
    with lk.use(case.model, weights):
        close(case.model(case.x), expected, 1e-12)
    lk.merge(case.model, weights)
    close(case.model(case.x), expected, 1e-12)


@pytest.mark.parametrize("second", ["full", "bitfit", "token_rows", "dora", "lorabias"])
@pytest.mark.parametrize("first", ["lora", "lorabias"])
def test_changes_of_the_output_and_of_the_weight_add_up(first: str, second: str) -> None:
    """A hooked layer whose parameter another adapter replaces: each change is measured from the base."""
    case = Case("linear", training=False)
    case.attach(first, "a")
    case.attach(second, "b")
    for weights in ({"a": 1.0, "b": 1.0}, {"a": 0.7, "b": 0.3}):
        expected = case.expected(weights)
        with lk.use(case.model, weights):
            close(case.model(case.x), expected, 1e-12)
        lk.merge(case.model, weights)
        close(case.model(case.x), expected, 1e-12)
        lk.unmerge(case.model)


@pytest.mark.parametrize("second", ["bitfit", "token_rows", "lora", "lorabias"])
def test_changes_of_dora_and_of_others_add_up(second: str) -> None:
    """As above; a whole other weight beneath DoRA is refused when it is attached."""
    test_changes_of_the_output_and_of_the_weight_add_up("dora", second)
    case = Case("linear")
    case.attach("dora", "a")
    with pytest.raises(lk.LorakitError, match="Choose one"):
        case.attach("full", "b")


@pairs(
    settings=("lora", "lorabias", "dora", "full"),
    kinds=("linear", "linear-nf4", "linear-slice", "conv2d", "mha-in"),
)
def test_unmerging_follows_a_cast(setting: str, kind: str) -> None:
    case = Case(kind, torch.float32, training=False)
    case.attach(setting)
    expected = case.model(case.x).detach()
    lk.merge(case.model, "a")
    case.model.double()
    lk.unmerge(case.model)
    assert {p.dtype for p in case.model.parameters()} == {torch.float64}
    close(case.model(case.x.double()), expected, 1e-5)


@pairs(settings=("lora", "dora"), kinds=("linear", "conv2d-groups", "mha-out"))
def test_merging_under_autocast_does_not_round_to_its_dtype(setting: str, kind: str) -> None:
    case = Case(kind, torch.float32, training=False)
    case.attach(setting)
    expected = case.expected({"a": 1.0})
    with torch.autocast("cpu", torch.bfloat16):
        lk.merge(case.model, "a")
    close(case.model(case.x), expected, 1e-5)


@pairs(
    kinds=("linear", "conv2d", "embedding", "experts", "mha-out", "linear-slice", "linear-nf4"),
    of=WeightMethod,
)
def test_a_permanent_merge_leaves_a_stock_model(setting: str, kind: str) -> None:
    case = Case(kind, training=False)
    stock = case.model.state_dict()
    case.attach(setting)
    expected = case.merged({"a": 1.0})
    lk.merge(case.model, "a", permanent=True)
    assert {**stock, "layer.bias": 0}.keys() >= case.model.state_dict().keys() >= stock.keys()
    close(case.model(case.x), expected, 1e-12)
