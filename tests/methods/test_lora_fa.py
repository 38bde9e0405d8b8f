"""LoRA-FA: ``A`` stays, only ``x Aᵀ`` is kept, and the corrected gradient is the projected one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core import Shape
from lorakit.errors import ConfigError
from tests.contracts.kinds import Host
from tests.contracts.pairs import Case, close, pairs, randomise


@contextlib.contextmanager
def kept_for_backward() -> Iterator[list[int]]:
    """The numbers of the tensors that the graph keeps in the block, parameters left out."""
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if not t.requires_grad or t.grad_fn is not None:
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield sizes


def model_on_inputs(method: lk.LoRA, tokens: int, in_: int, out: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Host(nn.Linear(in_, out))
    lk.attach(model, method, ["layer"], seed=0)
    randomise(lk.trainable(model).values(), torch.Generator().manual_seed(0))
    return model, torch.randn(tokens, in_)


@pytest.mark.parametrize("tokens", [16, 2048], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "bf16"])
def test_what_is_kept_grows_with_the_rank_and_not_with_the_input(tokens: int, dtype: torch.dtype) -> None:
    """``tokens * r`` numbers and the factors; a LoRA keeps ``tokens * in`` too."""
    in_, out, r = 256, 192, 4
    for method in (lk.LoRAFA(r=r), lk.LoRA(r=r)):
        model, x = model_on_inputs(method, tokens, in_, out)
        model.layer.to(dtype).lorakit.float()
        x = x.to(dtype)
        with kept_for_backward() as sizes:
            y = model(x)
        y.float().sum().backward()
        kept = sum(n for n in sizes if n not in (r * in_, r * out))
        if isinstance(method, lk.LoRAFA):
            assert kept <= 2 * tokens * r
        else:
            assert kept >= tokens * in_


def test_with_dropout_too() -> None:
    tokens, in_, r = 2048, 256, 4
    model, x = model_on_inputs(lk.LoRAFA(r=r, dropout=0.3), tokens, in_, 192)
    with kept_for_backward() as sizes:
        model(x).sum().backward()
    assert max(n for n in sizes if n not in (r * in_, r * 192)) <= tokens * r


def test_gradients_under_dropout_are_those_of_the_same_mask() -> None:
    """The gradient of ``B`` with ``A`` frozen is the one that a LoRA has for the same draw."""
    got = []
    for method in (lk.LoRAFA(r=4, dropout=0.3), lk.LoRA(r=4, dropout=0.3)):
        model, x = model_on_inputs(method, 2048, 64, 96)
        with torch.no_grad():
            model.layer.lorakit.output.default.lora_B.copy_(
                torch.randn(96, 4, generator=torch.Generator().manual_seed(1))
            )
            model.layer.lorakit.output.default.lora_A.copy_(
                torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
            )
        x.requires_grad_()
        torch.manual_seed(3)
        y = model(x)
        y.square().sum().backward()
        got.append((y.detach(), model.layer.lorakit.output.default.lora_B.grad, x.grad))
    for one, other in zip(*got, strict=True):
        close(one, other, 1e-5)


@pairs(settings=("lora_fa",))
def test_a_is_the_same_bits_after_training(setting: str, kind: str) -> None:
    case = Case(kind)
    case.attach(setting)
    before = case.parameters("a")["lora_A"].detach().clone()
    (process,) = lk.training_processes(case.model, "a", total_steps=3)
    optimizer = torch.optim.AdamW(lk.trainable(case.model).values(), lr=1e-2, weight_decay=0.1)
    start = case.parameters("a")["lora_B"].detach().clone()
    for step in range(3):
        case.model(case.x).square().sum().backward()
        process.before_step(step)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(case.parameters("a")["lora_A"], before)
    assert not torch.equal(case.parameters("a")["lora_B"], start)


def test_a_corrected_step_of_descent_is_the_full_gradient_on_the_rows_of_a() -> None:
    """``s dB A = -eta G P_A``, whatever the scale and ``A`` are."""
    for alpha in (1.0, 16.0):
        torch.manual_seed(0)
        model = Host(nn.Linear(12, 7))
        lk.attach(model, lk.LoRAFA(r=3, alpha=alpha), ["layer"], seed=0)
        p = model.layer.lorakit.output.default._parameters
        x, goal = torch.randn(20, 12), torch.randn(20, 7)
        (process,) = lk.training_processes(model, total_steps=1)
        before = p["lora_B"].detach().clone()
        optimizer = torch.optim.SGD([p["lora_B"]], lr=0.1)
        (model(x) - goal).square().mean().backward()
        process.before_step(0)
        optimizer.step()
        W = model.layer.weight.detach().clone().requires_grad_()
        (G,) = torch.autograd.grad((x @ W.T + model.layer.bias - goal).square().mean(), W)
        A = p["lora_A"].double()
        projection = A.T @ torch.linalg.inv(A @ A.T) @ A
        close(alpha / 3 * (p["lora_B"] - before).double() @ A, -0.1 * G.double() @ projection, 1e-5)


def test_the_correction_reaches_every_matrix_of_a_stack() -> None:
    case = Case("experts")
    case.attach("lora_fa")
    p = case.parameters("a")
    (process,) = lk.training_processes(case.model, "a", total_steps=1)
    case.model(case.x).square().sum().backward()
    g = p["lora_B"].grad.clone()
    process.before_step(0)
    for e in range(3):
        gram = p["lora_A"][e] @ p["lora_A"][e].T + 1e-8 * torch.eye(2)
        close(p["lora_B"].grad[e], g[e] @ torch.linalg.inv(gram) / (3 / 2) ** 2, 1e-10)


def test_directions_that_a_has_not_get_no_gradient() -> None:
    """The inverse of 1e-8 would make eight orders of magnitude of a rounding."""
    model = Host(nn.Linear(6, 5))
    lk.attach(model, lk.LoRAFA(r=2, alpha=2), ["layer"])
    p = model.layer.lorakit.output.default._parameters
    with torch.no_grad():
        p["lora_A"][1] = p["lora_A"][0]
    (process,) = lk.training_processes(model, total_steps=1)
    model(torch.randn(4, 6)).square().sum().backward()
    before = p["lora_B"].grad.abs().max()
    process.before_step(0)
    assert torch.isfinite(p["lora_B"].grad).all()
    assert p["lora_B"].grad.abs().max() < 100 * before


def test_without_correction_there_is_no_process() -> None:
    model = Host(nn.Linear(6, 5))
    lk.attach(model, lk.LoRAFA(r=2, gradient_correction=False), ["layer"])
    assert lk.training_processes(model, total_steps=3) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("half", [True, False], ids=["as-it-is", "without-autocast"])
def test_training_is_that_of_pefts_optimizer(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT rounds its corrected gradient to bf16: 1e-2. Without that, the roundings of float32."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import lorafa

    if not half:
        monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    torch.manual_seed(0)
    ours, theirs = Host(nn.Linear(12, 7)), Host(nn.Linear(12, 7))
    theirs.load_state_dict(ours.state_dict())
    config: Any = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"])
    wrapped = peft.get_peft_model(theirs, config)
    optimizer = lorafa.create_lorafa_optimizer(wrapped, r=3, lora_alpha=6, lr=1e-2)
    lk.attach(ours, lk.LoRAFA(r=3, alpha=6), ["layer"])
    p = ours.layer.lorakit.output.default._parameters
    inner = wrapped.base_model.model.layer
    with torch.no_grad():
        p["lora_A"].copy_(inner.lora_A["default"].weight)
    (process,) = lk.training_processes(ours, total_steps=10)
    # The two AdamW put eps in different places: so small it does not matter where.
    optimizer.param_groups[0]["eps"] = 1e-12
    own = torch.optim.AdamW([p["lora_B"]], lr=1e-2, eps=1e-12, weight_decay=0)
    x, goal = torch.randn(30, 12), torch.randn(30, 7)
    for step in range(10):
        (ours(x) - goal).square().mean().backward()
        (wrapped(x) - goal).square().mean().backward()
        process.before_step(step)
        own.step()
        optimizer.step()
        own.zero_grad()
        optimizer.zero_grad()
    trained = inner.lora_B["default"].weight
    assert (trained.abs() > 0.05).any()
    torch.testing.assert_close(
        p["lora_B"], trained, rtol=0, atol=(1e-2 if half else 1e-4) * float(trained.abs().max())
    )


def test_an_embedding_starts_with_a_random_a() -> None:
    """LoRA's start of an embedding has ``A = 0``: frozen, it would learn nothing."""
    case = Case("embedding-padding")
    before = case.model(case.x)
    lk.attach(case.model, lk.LoRAFA(r=2), ["layer"], name="a")
    p = case.parameters("a")
    assert torch.equal(case.model(case.x), before)
    assert not p["lora_B"].any()
    assert p["lora_A"].std() > 0.3
    assert not p["lora_A"][:, 2].any(), "the column of padding"
    (case.model(case.x) * case.cotangent(before)).sum().backward()
    assert p["lora_B"].grad.any()


def test_counts_and_patterns_are_loras() -> None:
    method = lk.LoRAFA(r=8, rank_pattern={"q": 2})
    assert method.for_path("a.q") == lk.LoRAFA(r=2)
    assert method.shapes(Shape("linear", out=5, in_=9)) == {"lora_A": (8, 9), "lora_B": (5, 8)}
    model = Host(nn.Linear(9, 5))
    report = lk.attach(model, lk.LoRAFA(r=2), ["layer"])
    assert (report.parameters, report.trainable) == (2 * 14, 2 * 5)


def test_a_subtracted_start_works_too() -> None:
    torch.manual_seed(0)
    model = Host(nn.Linear(9, 7))
    x = torch.randn(4, 9)
    before = model(x)
    lk.attach(model, lk.LoRAFA(r=2, init="pissa"), ["layer"])
    close(model(x), before, 1e-6)
    assert {n.rsplit(".", 1)[-1] for n in lk.trainable(model)} == {"lora_B"}


def test_for_other_programs_it_is_a_lora() -> None:
    case = Case("linear")
    case.attach("lora_fa")
    y = case.model(case.x)
    state = lk.extract(case.model, "a").plain()
    assert state.spec.methods["layer"] == lk.LoRA(r=2, alpha=3)
    lk.attach(case.stock, state, name="a")
    close(case.stock(case.x), y, 1e-14)


def test_a_correction_needs_a_scale() -> None:
    with pytest.raises(ConfigError, match="alpha=0"):
        lk.LoRAFA(alpha=0)
    assert lk.LoRAFA(alpha=0, gradient_correction=False).scale == 0
