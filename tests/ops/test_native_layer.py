"""The compiled way of a layer's hook: taken in the usual case and in no other, with the results of the long way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import lorakit as lk
from lorakit.ops.native import load

Change = Callable[[nn.Sequential], Any]


class Calls:
    """What stands in the place of the library's function, and notes whether it took a call."""

    def __init__(self, layer: load.Layer) -> None:
        self.layer, self.taken = layer, []

    def __call__(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        added = self.layer(layer, x, y)
        self.taken.append(added is not None)
        return added


@pytest.fixture
def calls(library: load.Library, monkeypatch: pytest.MonkeyPatch) -> Calls:
    load.status()
    counted = Calls(library.layer)
    monkeypatch.setattr(load, "product", library.product)
    monkeypatch.setattr(load, "layer", counted)
    return counted


def adapted(method: lk.Method | None = None, **settings: Any) -> nn.Sequential:
    """A layer of 12 to 8, its adapter ``a`` not at its start, and one call behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8)).eval()
    lk.attach(model, method or lk.LoRA(r=3, alpha=6), targets="all-linear", name="a", **settings)
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.normal_()
    model(torch.zeros(1, 12))
    return model


def long_way(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as without:
        without.setattr(load, "layer", None)
        without.setattr(load, "product", None)
        return model(x)


def test_it_is_taken_from_the_second_call_on_and_gives_the_same(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = adapted(), torch.randn(2, 5, 12)
    calls.taken.clear()
    got = model(x)
    assert calls.taken == [True]
    torch.testing.assert_close(got, long_way(model, x, monkeypatch), rtol=1e-5, atol=1e-5)
    weights = [*lk.trainable(model).values()]
    found = torch.autograd.grad(got.square().sum(), weights)
    exact = torch.autograd.grad(long_way(model, x, monkeypatch).square().sum(), weights)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_first_call_goes_the_long_way_for_the_report_tells_what_never_ran(calls: Calls) -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    lk.attach(model, lk.LoRA(r=3), targets="all-linear")
    model(torch.randn(2, 12))
    assert calls.taken == [False]
    assert not lk.report(model).never_ran


def _merged(model: nn.Sequential) -> None:
    lk.merge(model, "a")


def _second(model: nn.Sequential) -> None:
    lk.attach(model, lk.LoRA(r=2), targets="all-linear", name="b")


def _both(model: nn.Sequential) -> None:
    _second(model)
    lk.set_active(model, {"a": 0.5, "b": 0.5})


def _patched(model: nn.Sequential) -> None:
    forward = model[0].forward
    model[0].forward = lambda x: forward(x)  # type: ignore[method-assign]


UNUSUAL: dict[str, Change] = {
    "nothing acts": lambda model: lk.set_active(model, None),
    "half of it": lambda model: lk.set_active(model, {"a": 0.5}),
    "two act": _both,
    "merged": _merged,
    "somebody watches": lambda model: model[0].register_forward_hook(lambda *_: None),
    "a forward of its own": _patched,
}


@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL)
def test_whatever_is_not_usual_goes_the_long_way(
    calls: Calls, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = adapted(), torch.randn(2, 12)
    change(model)
    calls.taken.clear()
    got = model(x)
    assert calls.taken == [False]
    torch.testing.assert_close(got, long_way(model, x, monkeypatch), rtol=1e-5, atol=1e-5)


METHODS = {
    "bias": lk.LoRA(r=3, bias=True),
    "a start that is subtracted": lk.LoRA(r=3, init="pissa"),
    "DoRA": lk.DoRA(lk.LoRA(r=3)),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_other_methods_are_called(calls: Calls, method: lk.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(method), torch.randn(2, 12)
    calls.taken.clear()
    got = model(x)
    assert calls.taken == [False]
    torch.testing.assert_close(got, long_way(model, x, monkeypatch), rtol=1e-5, atol=1e-5)


def test_dropout_only_keeps_it_out_in_train_mode(calls: Calls) -> None:
    model, x = adapted(lk.LoRA(r=3, dropout=0.5)), torch.randn(2, 12)
    for training in (False, True, False):
        calls.taken.clear()
        model.train(training)
        model(x)
        assert calls.taken == [not training]


def test_inside_a_use_block_its_adapter_acts(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), torch.randn(2, 12)
    _second(model)
    expected = long_way(model, x, monkeypatch)
    calls.taken.clear()
    with lk.use(model, None):
        base = model(x)
    assert calls.taken == [False]
    assert not torch.equal(base, model(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_hook_of_all_modules_keeps_it_out(calls: Calls) -> None:
    model, seen = adapted(), []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(output.clone()))
    try:
        calls.taken.clear()
        result = model(torch.randn(2, 12))
    finally:
        handle.remove()
    assert calls.taken == [False]
    assert not torch.equal(seen[0], result), "it saw the base's output, which is not written over"


def test_copies_and_pickles_take_it_too(calls: Calls) -> None:
    model, x = adapted(), torch.randn(2, 12)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.taken.clear()
        assert torch.equal(other(x), expected)
        assert calls.taken == [True]


def test_part_of_a_layer_goes_the_long_way(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"qkv": nn.Linear(12, 24)})
    lk.attach(model, lk.LoRA(r=3), targets=["qkv[0:8]"])
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.normal_()
    x = torch.randn(2, 12)
    model["qkv"](x)
    calls.taken.clear()
    got = model["qkv"](x)
    assert calls.taken == [False]
    torch.testing.assert_close(got, long_way(model["qkv"], x, monkeypatch), rtol=1e-5, atol=1e-5)


def test_what_is_no_adapted_layer_is_declined(library: load.Library) -> None:
    x, y = torch.randn(2, 12), torch.randn(2, 8)
    for thing in (nn.Linear(12, 8), object(), None, 3):
        assert library.layer(thing, x, y) is None  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a layer, its input and its output"):
        library.layer(nn.Linear(12, 8), x)  # type: ignore[call-arg]


def test_a_compiler_of_graphs_does_not_meet_it(calls: Calls) -> None:
    model, x = adapted(), torch.randn(2, 12)
    expected = model(x)
    calls.taken.clear()
    got = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert calls.taken == []
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
