"""Slots of blocks: what goes wrong in a call, threads, several on one module, and beside other adapters."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import MergeError, RoutingError, UnsupportedTargetError
from tests.contracts.pairs import close

D = 6


class Layer(nn.Module):
    """A feed-forward written out in the layer, as in BART."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 8), nn.Linear(8, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(x)))


class Odd(nn.Module):
    """A block that is called and returns in whatever way a test asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, D)
        self.put: Any = lambda y: y

    def forward(self, first: Any, more: Any = None) -> Any:
        return self.put(self.fc(more if more is not None else first))


def model_of(layer: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"layer": layer}).double()


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.normal_(generator=torch.Generator().manual_seed(0))


def vectors() -> Tensor:
    return torch.randn(2, 3, D, dtype=torch.float64)


def with_adapter(layer: nn.Module, name: str, method: Any = None) -> nn.ModuleDict:
    model = model_of(layer)
    lk.attach(model, method or lk.ParallelAdapter(size=3), targets=[name])
    randomise(model)
    return model


@pytest.mark.parametrize("wrapped", [tuple, list, None], ids=["tuple", "list", "tensor"])
def test_an_output_that_begins_with_the_vectors_keeps_its_form(wrapped: Any) -> None:
    model = with_adapter(Odd(), "layer")
    x = vectors()
    plain = model["layer"](x)
    if wrapped is not None:
        model["layer"].put = lambda y: wrapped((y, "cache", None))
        out = model["layer"](x)
        assert type(out) is wrapped
        assert out[1:] == wrapped(("cache", None))
        assert torch.equal(out[0], plain)
    assert torch.equal(model["layer"](first=x)[0] if wrapped else model["layer"](first=x), plain)


def test_a_block_that_hands_out_its_own_tensor_is_not_written_to() -> None:
    model = with_adapter(Odd(), "layer")
    held = torch.randn(2, 3, D, dtype=torch.float64)
    model["layer"].put = lambda y: held
    before = held.clone()
    for rows in (None, ["default", None]):
        with torch.no_grad():
            if rows is None:
                changed = model["layer"](vectors())
            else:
                with lk.use(model, rows=rows):
                    changed = model["layer"](vectors())
        assert not torch.equal(changed, before)
        assert torch.equal(held, before)


@pytest.mark.parametrize(
    ("call", "put", "message"),
    [
        ((None, vectors()), lambda y: y, "called with a NoneType first"),
        ((vectors(),), lambda y: {"out": y}, "returned a dict"),
        ((vectors(),), lambda y: y[..., :4], r"called with \(2, 3, 6\) and returned \(2, 3, 4\)"),
        ((vectors(),), lambda y: y[:1], r"returned \(1, 3, 6\)"),
    ],
    ids=["no input", "dict", "width", "rows"],
)
def test_a_block_that_does_not_map_vectors_to_vectors_says_so(call: Any, put: Any, message: str) -> None:
    model = with_adapter(Odd(), "layer")
    model["layer"].put = put
    with pytest.raises(RoutingError, match=f"'layer'.*{message}"):
        model["layer"](*call)
    with lk.use(model, None):
        model["layer"](*call)


def test_a_span_that_ends_without_having_begun() -> None:
    model = with_adapter(Layer(), "layer[fc1:fc2]")
    with pytest.raises(RoutingError, match="ended without having begun"):
        model["layer"].fc2(torch.randn(3, 8, dtype=torch.float64))
    model["layer"](vectors())


def test_two_threads_carry_their_own_inputs() -> None:
    model = with_adapter(Layer(), "layer[fc1:fc2]")
    inputs = [torch.randn(2, D, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        expected = [model["layer"](x) for x in inputs]
    meet = threading.Barrier(2)

    def wait(module: nn.Module, args: Any) -> None:
        meet.wait(10)

    model["layer"].fc2.register_forward_pre_hook(wait)
    got: dict[int, Tensor] = {}

    def run(i: int) -> None:
        with torch.no_grad():
            got[i] = model["layer"](inputs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        torch.testing.assert_close(got[i], expected[i])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_carries_its_own_input(copied: Any) -> None:
    model = with_adapter(Layer(), "layer[fc1:fc2]")
    x = vectors()
    y = model["layer"](x).detach()
    twin = copied(model)
    lk.detach(model)
    torch.testing.assert_close(twin["layer"](x), y)
    assert not model["layer"].fc1._forward_pre_hooks
    assert not model["layer"].fc2._forward_hooks
    lk.detach(twin)
    torch.testing.assert_close(twin["layer"](x), model["layer"](x))


def test_a_block_around_an_adapted_layer_sees_what_that_layer_puts_out() -> None:
    """Whatever the order: LoRA changes the layer, and the block that ends in it is adapted from there."""
    outputs = []
    x = vectors()
    for order in ((0, 1), (1, 0)):
        torch.manual_seed(0)
        model = model_of(Layer())
        parts = [("layer.fc2", lk.LoRA(r=2), "a"), ("layer[fc1:fc2]", lk.Houlsby(size=3), "b")]
        for i in order:
            lk.attach(model, parts[i][1], targets=[parts[i][0]], name=parts[i][2])
        with torch.no_grad():
            for _, p in sorted(lk.trainable(model).items()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        with lk.use(model, ["a", "b"]):
            outputs.append(model["layer"](x))
        lk.set_active(model, "b")
        lk.merge(model, "a")
        with lk.use(model, ["a", "b"]):
            close(model["layer"](x), outputs[-1], 1e-12)
    close(outputs[0], outputs[1], 1e-12)


def test_a_bottleneck_cannot_be_merged_and_says_why() -> None:
    for name in ("layer[fc1:fc2]", "layer", "layer.fc2"):
        model = with_adapter(Layer(), name)
        with pytest.raises(MergeError, match=r"ParallelAdapter.*no weight and cannot be merged"):
            lk.merge(model)


def test_a_bottleneck_on_a_layer_whose_weight_is_merged_is_refused() -> None:
    """It is measured from the layer's base output, which a merge hides."""
    model = model_of(Layer())
    lk.attach(model, lk.LoRA(r=2), targets=["fc2"], name="a")
    lk.attach(model, lk.Houlsby(size=3), targets=["fc2"], name="b")
    randomise(model)
    lk.merge(model, "a")
    with pytest.raises(RoutingError, match="measured from the base"), lk.use(model, ["a", "b"]):
        pass


def test_a_whole_copy_of_the_weight_and_a_bottleneck_on_its_output_do_not_mix() -> None:
    model = model_of(Layer())
    lk.attach(model, lk.Houlsby(size=3), targets=["fc2"], name="a")
    with pytest.raises(UnsupportedTargetError, match="Choose one"):
        lk.attach(model, lk.FullFineTuning(), targets=["fc2.weight"], name="b")


def test_the_report_says_what_and_where() -> None:
    model = with_adapter(Layer(), "layer[fc1:fc2]")
    (site,) = lk.report(model).adapters[0].sites
    assert (site.path, site.kind, site.size, site.method, site.rank) == (
        "layer[fc1:fc2]",
        "module",
        "6 x 6",
        "parallel",
        None,
    )
    assert site.parameters == 2 * 3 * D + 3 + D
    assert not site.ran
    model["layer"](vectors())
    assert lk.report(model).never_ran == ()


def test_a_sequential_is_refused_because_it_runs_every_child() -> None:
    model = nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, D))})
    with pytest.raises(UnsupportedTargetError, match="Sequential, which runs every child"):
        lk.attach(model, lk.ParallelAdapter(size=2), targets=["ffn"])
    lk.attach(model, lk.ParallelAdapter(size=2), targets=["ffn[0:2]"])
