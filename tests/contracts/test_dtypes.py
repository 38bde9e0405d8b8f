"""Casts after attaching, a half-precision base under full-precision adapters, and autocast."""

from __future__ import annotations

import pytest
import torch

import lorakit as lk
from tests.contracts.pairs import Case, close, pairs

# bfloat16 keeps 8 bits: outputs of a few terms of size one agree to a few hundredths of the largest.
BF16 = 4e-2


@pairs()
def test_casting_the_model_casts_its_adapters(setting: str, kind: str) -> None:
    case = Case(kind, torch.float32)
    case.attach(setting)
    expected = case.expected({"a": 1.0})
    case.model.double()
    y = case.model(case.x.double() if case.x.is_floating_point() else case.x)
    assert y.dtype is torch.float64
    close(y, expected, 1e-6)  # Gemma's scale is kept in float32
    case.model.to(torch.bfloat16)
    x = case.x.to(torch.bfloat16) if case.x.is_floating_point() else case.x
    y = case.model(x)
    assert y.dtype is torch.bfloat16
    close(y, expected, BF16)
    y.float().square().sum().backward()
    assert {p.dtype for p in case.parameters("a").values()} == {torch.bfloat16}
    for p in case.trained("a").values():
        assert p.grad is not None
        assert torch.isfinite(p.grad).all()


@pairs()
def test_a_bf16_base_with_fp32_adapters(setting: str, kind: str) -> None:
    case = Case(kind, torch.bfloat16)
    case.attach(setting)
    assert {p.dtype for p in case.parameters("a").values()} == {torch.float32}
    expected = case.expected({"a": 1.0})
    y = case.model(case.x)
    assert y.dtype is torch.bfloat16
    close(y, expected, BF16)
    with torch.no_grad():
        close(case.model(case.x), expected, BF16)
    y.float().square().sum().backward()
    for p in case.trained("a").values():
        assert p.grad is not None
        assert p.grad.dtype is torch.float32
    if case.mergeable({"a": 1.0}):
        lk.merge(case.model, "a")
        close(case.model(case.x), case.merged({"a": 1.0}), BF16)
    base = {p.dtype for n, p in case.model.named_parameters() if "lorakit" not in n}
    assert base == {torch.bfloat16} or "bnb" in kind  # whose codes are parameters


@pairs()
def test_autocast(setting: str, kind: str) -> None:
    case = Case(kind, torch.float32)
    case.attach(setting)
    expected = case.expected({"a": 1.0})
    with torch.autocast("cpu", torch.bfloat16):
        y = case.model(case.x)
        with lk.use(case.model, None):
            assert case.model(case.x).dtype is y.dtype
        with torch.no_grad():
            close(case.model(case.x), expected, BF16)
    close(y, expected, BF16)
    y.float().square().sum().backward()
    for p in case.trained("a").values():
        assert p.grad is not None
        assert p.grad.dtype is torch.float32
        assert torch.isfinite(p.grad).all()


@pairs(kinds=("linear", "conv2d", "embedding", "mha-in", "experts"))
def test_an_adapter_can_be_kept_in_the_dtype_of_a_bf16_base(setting: str, kind: str) -> None:
    case = Case(kind, torch.bfloat16)
    case.attach(setting, dtype=torch.bfloat16)
    assert {p.dtype for p in case.parameters("a").values()} == {torch.bfloat16}
    close(case.model(case.x), case.expected({"a": 1.0}), BF16)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d-groups"])
def test_the_norms_of_dora_are_not_rounded_by_autocast(kind: str) -> None:
    case = Case(kind, torch.float32)
    case.attach("dora")
    target, p = case.target(), case.parameters("a")
    exact = lk.DoRA(lk.LoRA(r=2, alpha=3)).norms(target, p, target.weight())
    with torch.autocast("cpu", torch.bfloat16):
        again = lk.DoRA(lk.LoRA(r=2, alpha=3)).norms(target, p, target.weight())
    assert torch.equal(again, exact)
