"""Activation checkpointing: the re-run in backward takes the adapters of the forward pass, or says it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakit as lk
from tests.contracts.pairs import Case, close, pairs

KINDS = ("linear", "hfconv1d", "embedding", "conv2d-groups", "mha-in", "mha-out", "experts")
MORE = ("linear-slice", "linear-slice-interleaved", "linear-nf4", "linear-int8", "ffn", "ffn-span")
some = pairs(kinds=(*KINDS, *MORE))
ways = pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])


class Checkpointed(nn.Module):
    """A model whose inside is run again in the backward pass."""

    def __init__(self, inner: nn.Module, reentrant: bool, *, contexts: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.options = {"context_fn": lk.checkpoint_contexts} if contexts else {}
        self.reentrant = reentrant

    def run(self, x: Tensor, zero: Tensor) -> Tensor:
        return self.inner(x) + zero

    def forward(self, x: Tensor) -> Tensor:
        zero = torch.zeros(
            (), dtype=torch.float64, requires_grad=True
        )  # reentrant: an input must need a gradient
        return checkpoint(self.run, x, zero, use_reentrant=self.reentrant, **self.options)  # type: ignore[no-any-return]


def gradients(case: Case, model: nn.Module, name: str, G: Tensor) -> list[Tensor]:
    case.model.zero_grad()
    (model(case.x) * G).sum().backward()
    return [p.grad.clone() for p in case.parameters(name).values() if p.grad is not None]


def two_adapters(setting: str, kind: str) -> tuple[Case, Tensor]:
    case = Case(kind)
    case.attach(setting, "a")
    case.attach_partner(setting, "b")
    return case, case.cotangent(case.model(case.x))


@ways
@some
def test_gradients_are_those_without_checkpointing(setting: str, kind: str, reentrant: bool) -> None:
    case, G = two_adapters(setting, kind)
    model = Checkpointed(case.model, reentrant)
    for route in ("a", "b", {"a": 0.5, "b": 2.0}):
        with lk.use(case.model, route):
            expected = gradients(case, case.model, "b" if route == "b" else "a", G)
            got = gradients(case, model, "b" if route == "b" else "a", G)
        assert len(expected) == len(got) > 0
        for one, other in zip(got, expected, strict=True):
            close(one, other, 1e-12)


@ways
@some
def test_the_default_route_needs_no_care(setting: str, kind: str, reentrant: bool) -> None:
    case, G = two_adapters(setting, kind)
    lk.set_active(case.model, "b")
    expected = gradients(case, case.model, "b", G)
    got = gradients(case, Checkpointed(case.model, reentrant), "b", G)
    assert len(expected) == len(got) > 0
    for one, other in zip(got, expected, strict=True):
        close(one, other, 1e-12)


@ways
@pairs(settings=("lora", "dora", "full"), kinds=("linear", "mha-in", "mha-out"))
def test_backward_outside_the_block_is_refused(setting: str, kind: str, reentrant: bool) -> None:
    case, G = two_adapters(setting, kind)
    with lk.use(case.model, "b"):
        loss = (Checkpointed(case.model, reentrant)(case.x) * G).sum()
    with pytest.raises(lk.LorakitError, match="checkpoint_contexts"):
        loss.backward()


@pairs(settings=("lora", "dora", "full"), kinds=("linear", "embedding", "mha-in", "mha-out"))
def test_backward_outside_the_block_is_right_with_contexts(setting: str, kind: str) -> None:
    case, G = two_adapters(setting, kind)
    with lk.use(case.model, "b"):
        expected = gradients(case, case.model, "b", G)
    case.model.zero_grad()
    with lk.use(case.model, "b"):
        loss = (Checkpointed(case.model, False, contexts=True)(case.x) * G).sum()
    loss.backward()
    for p, other in zip(case.parameters("b").values(), expected, strict=True):
        assert p.grad is not None
        close(p.grad, other, 1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@ways
def test_dropout_is_the_same_in_the_second_run(kind: str, reentrant: bool) -> None:
    case = Case(kind)
    lk.attach(case.model, lk.LoRA(r=2, dropout=0.4), [case.kind.names], name="a", seed=0)
    case.settings["a"] = "lora"
    with torch.no_grad():
        case.parameters("a")["lora_B"].normal_(generator=case.draw)
    G = case.cotangent(case.model(case.x))
    torch.manual_seed(5)
    expected = gradients(case, case.model, "a", G)
    torch.manual_seed(5)
    got = gradients(case, Checkpointed(case.model, reentrant), "a", G)
    for one, other in zip(got, expected, strict=True):
        close(one, other, 1e-12)
