"""Detaching: the model is what it was, to the last bit, hook, class and flag, and the memory comes back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterNameError, MergeError, NotAttachedError, RoutingError
from tests.attach.small_models import Mlp, TiedLm, fill, names_of, picture, with_adapters

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Everything(nn.Module):
    """One of each: layers with hooks, bound parameters, a tie, an attention, buffers, mixed flags and modes."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = TiedLm(padding_idx=0)
        self.conv = nn.Conv2d(2, 4, 3, groups=2, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(6, 2)
        self.experts = nn.Parameter(torch.randn(3, 4, 6))
        self.mlp = Mlp().eval()
        self.mlp.fc1.weight.requires_grad_(False)
        self.mlp.fc2.register_forward_hook(lambda m, i, o: None)
        self.mlp.fc2.register_full_backward_hook(lambda m, i, o: None)
        self.mlp.register_forward_pre_hook(lambda m, i: None)

    def forward(self) -> torch.Tensor:
        words = self.lm(torch.tensor([[1, 2]])).sum()
        image = self.norm(self.conv(torch.ones(2, 2, 5, 5))).sum()
        return (
            words + image + self.attention(X, X, X)[0].sum() + (self.experts @ X.T).sum() + self.mlp(X).sum()
        )


METHODS: dict[str, tuple[Any, Any]] = {
    "lora": (lk.LoRA(r=2, dropout=0.1), ["embed", "body", "head", "conv", "mlp.fc1", "mlp.fc2"]),
    "lora with bias": (lk.LoRA(r=2, bias=True), "all-linear"),
    "dora": (lk.DoRA(lk.LoRA(r=2)), ["embed", "body", "conv", "fc1", "experts", "attention"]),
    "bound": (lk.LoRA(r=2), ["experts", "attention", "in_proj_weight"]),
    "full": (lk.FullFineTuning(), None),
    "bitfit": (lk.BitFit(), None),
    "token rows": (lk.TokenRows((1, 3)), ["embed"]),
    "mapping": ({"all-linear": lk.LoRA(r=2, bias=True), "all-bias": lk.BitFit()}, None),
}


@pytest.mark.parametrize("between", ["nothing", "merged", "unmerged", "run", "trained", "failed merge"])
@pytest.mark.parametrize("case", METHODS)
def test_detach_restores_the_model_exactly(case: str, between: str) -> None:
    method, targets = METHODS[case]
    model = Everything()
    if case == "lora with bias":
        targets = ["body", "conv", "fc1", "fc2"]
    if case == "mapping":
        method = {"fc1": lk.LoRA(r=2, bias=True), "fc2": lk.LoRA(r=2, bias=True), "all-bias": lk.BitFit()}
    before = picture(model)
    lk.attach(model, method, targets)
    fill(model)
    if between in ("merged", "unmerged"):
        lk.merge(model)
    if between == "unmerged":
        lk.unmerge(model)
    if between == "run":
        with torch.no_grad(), lk.use(model, {"default": 0.5}):
            model.norm.eval()
            model()
            model.norm.train()
    if between == "trained":
        model.norm.eval()  # its running statistics are the user's own affair
        model().backward()
        model.norm.train()
        with torch.no_grad():
            for p in lk.trainable(model).values():
                p.add_(1.0)
    if between == "failed merge":
        with torch.no_grad():
            next(iter(lk.trainable(model).values())).fill_(float("inf"))
        with pytest.raises(MergeError):
            lk.merge(model)
    lk.detach(model)
    assert picture(model) == before


@pytest.mark.parametrize(
    "name", ["training", "weight", "forward", "lora_A", "default", "output", "lorakit", "_modules", "ü b"]
)
def test_any_word_is_a_good_name(name: str) -> None:
    model = Mlp()
    before = picture(model)
    base = model(X)
    lk.attach(model, lk.LoRA(r=2), name=name)
    lk.attach(model, lk.FullFineTuning(), ["norm"], name=name + "2")
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.uniform_(0.5, 1)
    assert (model(X) - base).abs().max() > 0.01
    with lk.use(model, None):
        assert torch.equal(model(X), base)
    assert set(lk.extract(model, name).tensors) == {"fc1", "fc2"}
    lk.detach(model)
    assert picture(model) == before


def test_one_of_several_goes_and_the_others_stay() -> None:
    model = with_adapters(Mlp(), "a", "a1", "a12")
    with lk.use(model, "a12"):
        want = model(X)
    lk.detach(model, "a1")
    assert names_of(model) == ["a", "a12"]
    with lk.use(model, "a12"):
        assert torch.equal(model(X), want)
    lk.attach(model, lk.LoRA(r=3), name="a1")  # the name is free again
    assert names_of(model) == ["a", "a12", "a1"]


def test_slots_go_with_their_last_adapter() -> None:
    model = Mlp()
    lk.attach(model, lk.LoRA(r=2), ["fc1"], name="a")
    lk.attach(model, lk.LoRA(r=2), ["fc1", "fc2"], name="b")
    lk.detach(model, "b")
    assert "lorakit" in model.fc1._modules
    assert "lorakit" not in model.fc2._modules
    assert not model.fc2._forward_hooks


def test_flags_return_with_the_last_adapter() -> None:
    model = Mlp()
    model.fc1.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with_adapters(model, "a", "b")
    lk.detach(model, "a")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lorakit" not in n)
    lk.detach(model, "b")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_the_default_loses_what_is_detached() -> None:
    model = with_adapters(Mlp(), "a", "b")
    lk.set_active(model, {"a": 0.5, "b": 2})
    lk.detach(model, "b")
    assert lk.report(model).active == {"a": 0.5}
    lk.detach(model, "a")
    with_adapters(model, "b")
    assert lk.report(model).active == {"b": 1.0}


def test_detaching_one_of_two_that_are_merged_keeps_the_other_merged() -> None:
    model = with_adapters(Mlp(), "a", "b")
    with lk.use(model, None):
        base = model(X)
    with lk.use(model, "a"):
        want = model(X)
    lk.merge(model, {"a": 1, "b": 0.5})
    lk.detach(model, "b")
    assert lk.report(model).merged == {"a": 1.0}
    torch.testing.assert_close(model(X), want)
    lk.unmerge(model)
    with lk.use(model, None):
        assert torch.equal(model(X), base)


def test_detaching_what_is_not_merged_leaves_the_merge() -> None:
    model = with_adapters(Mlp(), "a", "b")
    lk.set_active(model, ["a", "b"])
    lk.merge(model, "a")
    weight = model.fc1.weight
    lk.detach(model, "b")
    assert model.fc1.weight is weight
    lk.unmerge(model)
    assert lk.report(model).active == {"a": 1.0}  # and not the one that is gone


def test_detaching_is_refused_while_a_block_uses_the_adapter() -> None:
    model = with_adapters(Mlp(), "a", "b")
    attempts: list[tuple[Any, str]] = [
        (lk.use(model, "a"), "a"),
        (lk.use(model, {"a": 0.5, "b": 1}), "b"),
        (lk.use(model, rows=["a", None]), "a"),
    ]
    for block, name in attempts:
        with block:
            before = picture(model)
            with pytest.raises(RoutingError, match=f"{name} is in use"):
                lk.detach(model, name)
            assert picture(model) == before
    with lk.use(model, "b"):
        lk.detach(model, "a")
    assert names_of(model) == ["b"]


def test_detaching_what_is_merged_is_refused_while_any_block_is_open() -> None:
    model = with_adapters(Mlp(), "a", "b")
    lk.merge(model, "a")
    before = picture(model)
    with lk.use(model, "a"), pytest.raises(MergeError, match="outside of it"):
        lk.detach(model, "a")
    assert picture(model) == before


def test_what_is_not_there_cannot_be_detached() -> None:
    model = with_adapters(Mlp(), "sql")
    before = picture(model)
    with pytest.raises(AdapterNameError, match=r"Did you mean 'sql'"):
        lk.detach(model, "sqll")
    assert picture(model) == before
    lk.detach(model)
    with pytest.raises(NotAttachedError, match="carries no adapters"):
        lk.detach(model)


def test_attaching_and_detaching_again_and_again_leaves_no_trace() -> None:
    model = Mlp()
    before = picture(model)
    for i in range(5):
        with_adapters(model, f"a{i}", f"b{i}")
        lk.merge(model)
        lk.detach(model)
    assert picture(model) == before


def test_a_model_whose_layers_were_replaced_meanwhile_can_still_be_detached() -> None:
    model = with_adapters(Mlp(), "a")
    model.fc2 = nn.Linear(8, 4)
    lk.detach(model)
    assert names_of(model) == []
    assert "lorakit" not in model.fc1._modules
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_adapters(Mlp(), "a", "b"),
        lambda: with_adapters(nn.MultiheadAttention(8, 2), "a", "b", targets=["in_proj_weight", "out_proj"]),
    ],
    ids=["hooked", "bound"],
)
def test_detaching_gives_the_memory_back(make: Callable[[], nn.Module]) -> None:
    model = make()
    adapters = [weakref.ref(p) for p in lk.trainable(model).values()]
    slots = [weakref.ref(m) for m in model.modules() if type(m).__name__ == "Slot"]
    assert adapters
    assert slots
    gc.disable()
    try:
        lk.detach(model)
        assert not any(r() for r in (*adapters, *slots))  # freed at once, no cycle left to be collected
    finally:
        gc.enable()


def test_deleting_the_model_gives_everything_back() -> None:
    model = with_adapters(Mlp(), "a")
    lk.merge(model)
    with torch.no_grad():
        model(X)
    refs = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(r() for r in refs)
