"""Activation checkpointing runs layers again during backward: under the adapter of the forward pass, or not at all."""

from __future__ import annotations

import contextvars
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakit as lk
from lorakit.errors import RoutingError
from tests.attach.small_models import Mlp, with_adapters

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Checkpointed(nn.Module):
    """A block that is run again in backward."""

    def __init__(self, *, use_reentrant: bool = False, **settings: Any) -> None:
        super().__init__()
        self.block = Mlp()
        self.settings = {"use_reentrant": use_reentrant, **settings}
        self.plain = False

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if self.plain else checkpoint(self.block, x, **self.settings)


def gradients(model: nn.Module, x: Tensor, route: Any, *, inside: bool = True) -> dict[str, Tensor]:
    """Gradients of every adapter after one pass under a route."""
    model.zero_grad()
    x = x.clone().requires_grad_()  # what reentrant checkpointing asks for
    with lk.use(model, **route):
        loss = model(x).pow(2).sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return {n: p.grad.clone() for n, p in lk.trainable(model).items() if p.grad is not None}


def plain(model: Checkpointed, route: Any) -> dict[str, Tensor]:
    """The same without checkpointing."""
    model.plain = True
    try:
        return gradients(model, X, route)
    finally:
        model.plain = False


ROUTES = [
    {"route": "b"},
    {"route": {"a": 0.5, "b": 2}},
    {"rows": ["a", "b", None, "b", "a"]},
    {"route": None},
]


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_inside_the_block(route: Any, reentrant: bool) -> None:
    model = with_adapters(Checkpointed(use_reentrant=reentrant), "a", "b")
    got, want = gradients(model, X, route), plain(model, route)
    assert set(got) == set(want)
    for name in got:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("training", [True, False])
def test_backward_outside_the_block_with_the_contexts(training: bool) -> None:
    model = with_adapters(Checkpointed(context_fn=lk.checkpoint_contexts), "a", "b").train(training)
    for route in ROUTES:
        got, want = gradients(model, X, route, inside=False), plain(model, route)
        assert set(got) == set(want)
        for name in got:
            torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_outside_the_block_without_them_is_an_error_and_never_the_wrong_adapter(
    reentrant: bool,
) -> None:
    model = with_adapters(Checkpointed(use_reentrant=reentrant), "a", "b")
    with pytest.raises(RoutingError, match="checkpoint_contexts"):
        gradients(model, X, {"route": "b"}, inside=False)


def test_the_default_adapter_needs_no_block() -> None:
    for reentrant in (False, True):
        model = with_adapters(Checkpointed(use_reentrant=reentrant), "a", "b")
        want = plain(model, {"route": "b"})
        lk.set_active(model, "b")
        model.zero_grad()
        model(X.clone().requires_grad_()).pow(2).sum().backward()
        for name, p in lk.trainable(model).items():
            if p.grad is not None:
                torch.testing.assert_close(p.grad, want[name])


def test_after_a_block_the_advice_of_the_error_works() -> None:
    model = with_adapters(Checkpointed(), "a", "b")
    gradients(model, X, {"route": "b"})
    lk.set_active(model, "a")
    model(X).sum().backward()


def test_inference_in_blocks_does_not_disturb_training_with_the_default() -> None:
    model = with_adapters(Checkpointed(), "a", "b").eval()
    with torch.no_grad(), lk.use(model, "b"):
        model(X)
    model.train()
    model(X).sum().backward()


def test_dropout_is_the_same_in_the_second_run() -> None:
    model = with_adapters(Checkpointed(), "a", method=lk.LoRA(r=2, dropout=0.5))
    torch.manual_seed(3)
    model(X).pow(2).sum().backward()
    got = {n: p.grad.clone() for n, p in lk.trainable(model).items()}
    model.zero_grad()
    torch.manual_seed(3)
    model.block(X).pow(2).sum().backward()
    for name, p in lk.trainable(model).items():
        torch.testing.assert_close(got[name], p.grad)


def test_a_backward_thread_of_torchs_own_sees_the_block_it_was_called_in() -> None:
    """On a GPU the second run happens in such a thread, whose own context is empty; so is the one made here."""
    model = with_adapters(Mlp(), "a", "b").eval()
    with torch.no_grad(), lk.use(model, "b"):
        want = model(X)
    seen: list[Tensor] = []

    def run_again(grad: Tensor) -> None:
        contextvars.Context().run(lambda: seen.append(model(X).detach()))

    x = X.clone().requires_grad_()
    with lk.use(model, "b"):
        y = model(x)
        y.register_hook(run_again)
        y.sum().backward()
    assert torch.equal(seen[0], want)


def test_a_reference_pass_without_an_adapter_does_not_disturb_checkpointed_training() -> None:
    """Preference training: the base answers in a block, the adapter trains outside of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).train()
    lk.attach(model, lk.LoRA(r=2), targets=["0", "2"])
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.normal_()
    x = torch.randn(3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    with torch.no_grad(), lk.use(model, None):
        model(x)
    y = checkpoint(model, x, use_reentrant=False, context_fn=lk.checkpoint_contexts)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, expected)
