"""DoRA: facts that hold whatever the numbers are."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core import Shape
from lorakit.errors import ConfigError, UnsupportedTargetError
from lorakit.methods import dora as module
from tests.contracts.kinds import Host
from tests.contracts.pairs import Case, close, pairs

dora = pairs(settings=("dora", "dora_rslora"))


@dora
def test_the_rows_of_the_new_weight_are_as_long_as_the_magnitude(setting: str, kind: str) -> None:
    case = Case(kind)
    case.attach(setting)
    W, p = case.target().weight(), case.parameters("a")
    method = case.method("a")
    assert isinstance(method, lk.DoRA)
    tolerance = 1e-12 if W.dtype is torch.float64 else 1e-6  # bitsandbytes' weights are float32 at most
    close(method.weight(case.target(), p, W).norm(dim=-1), p["magnitude"].abs(), tolerance)


@dora
def test_the_magnitude_starts_at_the_norms_of_the_base(setting: str, kind: str) -> None:
    case = Case(kind)
    case.attach(setting, random=False)
    close(case.parameters("a")["magnitude"], case.target().weight().norm(dim=-1), 1e-14)


def test_twice_the_magnitude_is_twice_the_output_without_bias() -> None:
    case = Case("linear")
    case.attach("dora")
    bias = case.model.layer.bias
    one = case.model(case.x) - bias
    with torch.no_grad():
        case.parameters("a")["magnitude"].mul_(2)
    close(case.model(case.x) - bias, 2 * one, 1e-12)


def test_the_length_of_the_direction_does_not_matter() -> None:
    case = Case("linear")
    case.attach("dora")
    y = case.model(case.x)
    with torch.no_grad():
        case.model.layer.weight.mul_(3)
        case.parameters("a")["lora_B"].mul_(3)
    close(case.model(case.x), y, 1e-12)


def test_the_count_of_the_paper() -> None:
    """LLaMA-7B, r = 32 on q, k, v, up and down: 56,975,360 (0.8455 % in the paper); half the rank: 28,925,952."""
    d, inner, layers = 4096, 11008, 32
    sizes = [(d, d)] * 3 + [(inner, d), (d, inner)]
    for r, count in ((32, 56_975_360), (16, 28_925_952)):
        method = lk.DoRA(lk.LoRA(r=r))
        shapes = [method.shapes(Shape("linear", out=o, in_=i)) for o, i in sizes]
        assert layers * sum(torch.Size(s).numel() for each in shapes for s in each.values()) == count


def test_a_row_of_zeros_stays_zero_and_finite() -> None:
    model = Host(nn.Linear(4, 3))
    with torch.no_grad():
        model.layer.weight[1] = 0
    x = torch.randn(5, 4)
    before = model(x)
    lk.attach(model, lk.DoRA(lk.LoRA(r=2)), ["layer"])
    y = model(x)
    assert torch.equal(y, before)
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in lk.trainable(model).values() if p.grad is not None)


def test_dropout_acts_on_the_change_alone() -> None:
    """With ``B = 0`` dropout changes nothing: the base term sees the whole input."""
    case = Case("linear")
    before = case.model(case.x)
    lk.attach(case.model, lk.DoRA(lk.LoRA(r=2, dropout=0.5)), ["layer"], name="a")
    assert torch.equal(case.model(case.x), before)
    with torch.no_grad():
        case.parameters("a")["lora_B"].normal_()
    assert not torch.equal(case.model(case.x), case.model(case.x))


@pytest.mark.parametrize(
    "inner", [lk.FullFineTuning(), lk.DoRA(), lk.TokenRows(ids=(1,)), "lora", None], ids=str
)
def test_it_wraps_methods_that_add_a_change(inner: object) -> None:
    with pytest.raises(ConfigError, match="DoRA wraps a method that adds a change"):
        lk.DoRA(inner)  # type: ignore[arg-type]


def test_what_the_inner_method_cannot_do_is_refused() -> None:
    with pytest.raises(UnsupportedTargetError, match=r"bias=False"):
        lk.attach(Host(nn.Linear(4, 4)), lk.DoRA(lk.LoRA(r=2, bias=True)), ["layer"])
    with pytest.raises(UnsupportedTargetError, match="no input to drop"):
        lk.attach(nn.MultiheadAttention(4, 2), lk.DoRA(lk.LoRA(r=2, dropout=0.1)), ["out_proj"])


def test_patterns_and_roles_are_those_of_the_inner_method() -> None:
    method = lk.DoRA(lk.LoRA(r=8, rank_pattern={"q": 2}))
    assert method.for_path("a.q") == lk.DoRA(lk.LoRA(r=2))
    assert method.patterns() == ("q",)
    assert method.roles["magnitude"] == "magnitude"
    assert method.roles["lora_A"] == "A"


# ---- gradients ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "full"])
def test_gradients_are_those_of_the_reference(detach_norm: bool) -> None:
    """``dV = (m / n) G``, or in full ``(m / n) (I - v vᵀ / n²) G`` for each row; ``dm_j = <G_j, V_j> / n_j``."""
    torch.manual_seed(0)
    model = Host(nn.Linear(9, 7)).double()
    lk.attach(model, lk.DoRA(lk.LoRA(r=3, alpha=5), detach_norm=detach_norm), ["layer"], dtype=torch.float64)
    p = {n.rsplit(".", 1)[-1]: q for n, q in model.named_parameters() if "lorakit" in n}
    with torch.no_grad():
        for q in p.values():
            q.add_(0.3 * torch.randn_like(q))
    x, g = torch.randn(11, 9, dtype=torch.float64), torch.randn(11, 7, dtype=torch.float64)
    (model(x) * g).sum().backward()
    with torch.no_grad():
        A, B, m, s = p["lora_A"], p["lora_B"], p["magnitude"], 5 / 3
        V = model.layer.weight + s * B @ A
        n, G = V.norm(dim=1), g.T @ x
        dV = (m / n)[:, None] * G
        if not detach_norm:
            dV -= (m / n**3)[:, None] * (G * V).sum(1, keepdim=True) * V
        expected = {"lora_A": s * B.T @ dV, "lora_B": s * dV @ A.T, "magnitude": (G * V).sum(1) / n}
    for name, gradient in expected.items():
        torch.testing.assert_close(p[name].grad, gradient, rtol=1e-12, atol=1e-12)


def test_the_full_gradient_is_finite_where_a_row_is_zero() -> None:
    model = Host(nn.Linear(4, 3))
    with torch.no_grad():
        model.layer.weight[1] = 0
    lk.attach(model, lk.DoRA(lk.LoRA(r=2), detach_norm=False), ["layer"])
    model(torch.randn(5, 4)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in lk.trainable(model).values() if p.grad is not None)


def test_over_pissa_nothing_is_special() -> None:
    """The norms of the direction at the start are those of the base, and training moves it as it moves a PiSSA."""
    case = Case("linear")
    case.attach("dora_pissa", random=False)
    W, p = case.target().weight(), case.parameters("a")
    assert torch.equal(p["magnitude"], W.norm(dim=-1))
    (case.model(case.x) * torch.randn_like(case.model(case.x))).sum().backward()
    assert all(p[name].grad is not None and p[name].grad.any() for name in ("lora_A", "lora_B", "magnitude"))  # type: ignore[union-attr]


# ---- norms that are remembered --------------------------------------------------------------------------------------
@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often row norms are computed."""
    calls: list[int] = []
    real = module.row_norms

    def counting(*args: object, **kwargs: object) -> Tensor:
        calls.append(1)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "row_norms", counting)
    return calls


def adapted(name: str = "a", training: bool = False) -> Case:
    case = Case("linear", training=training)
    case.attach("dora", name)
    return case


@torch.no_grad()
def test_in_eval_the_norms_are_computed_once(count: list[int]) -> None:
    case = adapted()
    count.clear()
    first = case.model(case.x)
    for _ in range(3):
        assert torch.equal(case.model(case.x), first)
    assert len(count) == 1
    close(first, case.expected({"a": 1.0}), 1e-12)


def test_in_training_they_are_computed_each_time(count: list[int]) -> None:
    for training, grad in ((True, True), (True, False), (False, True)):
        case = adapted(training=training)
        count.clear()
        with torch.set_grad_enabled(grad):
            case.model(case.x), case.model(case.x)
        assert len(count) == 2, (training, grad)


def factor(case: Case) -> None:
    case.parameters("a")["lora_B"].mul_(2)


def magnitude(case: Case) -> None:
    case.parameters("a")["magnitude"].mul_(2)


def base(case: Case) -> None:
    case.model.layer.weight.mul_(3).add_(0.1)
    case.stock.layer.weight.copy_(case.model.layer.weight)


def new_base(case: Case) -> None:
    case.model.layer.weight = nn.Parameter(case.model.layer.weight * 2 + 0.1, requires_grad=False)
    case.stock.layer.weight.copy_(case.model.layer.weight)


def new_data(case: Case) -> None:
    p = case.parameters("a")["lora_A"]
    p.data = p.data * 2


def loaded(case: Case) -> None:
    state = {k: v * 1.5 if "lorakit" in k else v for k, v in case.model.state_dict().items()}
    case.model.load_state_dict(state)


def cast(case: Case) -> None:
    case.model.float().double()
    case.stock.layer.weight.copy_(case.model.layer.weight)
    case.stock.layer.bias.copy_(case.model.layer.bias)


def in_inference_mode(case: Case) -> None:
    with torch.inference_mode():
        case.parameters("a")["lora_B"].mul_(2)


CHANGES = [factor, magnitude, base, new_base, new_data, loaded, cast, in_inference_mode]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen_at_once(change: Callable[[Case], None]) -> None:
    case = adapted()
    with torch.no_grad():
        before = case.model(case.x)
        change(case)
        after = case.model(case.x)
        close(after, case.expected({"a": 1.0}), 1e-12)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_of_training_is_seen(fused: bool) -> None:
    """Fused optimizers leave no trace in a tensor's version."""
    case = adapted(training=True)
    optimizer = torch.optim.SGD(lk.trainable(case.model).values(), lr=0.1, fused=fused)
    for _ in range(3):
        case.model.train()
        case.model(case.x).square().mean().backward()
        case.model.eval()
        with torch.no_grad():
            close(case.model(case.x), case.expected({"a": 1.0}), 1e-12)
        optimizer.step()
        for zero in (False, True):
            if zero:
                optimizer.zero_grad()
            with torch.no_grad():
                close(case.model(case.x), case.expected({"a": 1.0}), 1e-12)


@torch.no_grad()
def test_merging_and_unmerging_are_seen() -> None:
    case = adapted()
    case.attach("lora", "b")
    alone = case.model(case.x)
    lk.merge(case.model, {"a": 1.0, "b": 1.0})
    close(case.model(case.x), case.expected({"a": 1.0, "b": 1.0}), 1e-12)
    lk.unmerge(case.model)
    assert torch.equal(case.model(case.x), alone)
    with lk.use(case.model, {"a": 0.5, "b": 1.0}):
        close(case.model(case.x), case.expected({"a": 0.5, "b": 1.0}), 1e-12)


@torch.no_grad()
def test_copies_remember_for_themselves() -> None:
    case = adapted()
    y = case.model(case.x)
    for twin in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        for p in case.parameters("a", twin).values():
            p.mul_(1.5)
        assert not torch.equal(twin(case.x), y)
        assert torch.equal(case.model(case.x), y)


@torch.no_grad()
def test_what_is_remembered_goes_with_the_adapter() -> None:
    gc.collect()
    gains, squares = len(module._GAINS), len(module._SQUARES)
    case = adapted()
    case.model(case.x)
    assert (len(module._GAINS), len(module._SQUARES)) == (gains + 1, squares + 1)
    lk.detach(case.model)
    gc.collect()
    assert len(module._GAINS) == gains
    del case
    gc.collect()
    assert len(module._SQUARES) == squares


def test_threads_see_their_own_adapters() -> None:
    case = adapted("a")
    case.attach("dora", "b")
    want = {name: case.expected({name: 1.0}) for name in "ab"}
    wrong: list[str] = []

    def run(name: str) -> None:
        with torch.no_grad(), lk.use(case.model, name):
            for _ in range(200):
                if not torch.allclose(case.model(case.x), want[name], atol=1e-10):
                    wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in "abab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_was_remembered_in_inference_mode_can_be_trained_through() -> None:
    case = adapted()
    for p in case.parameters("a").values():
        p.requires_grad_(False)
    with torch.inference_mode():
        y = case.model(case.x)
    x = case.x.clone().requires_grad_()
    again = case.model(x)
    assert torch.equal(again, y)
    again.sum().backward()
    assert x.grad is not None


def test_in_training_the_squares_of_a_frozen_base_are_summed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = module.row_squares
    monkeypatch.setattr(module, "row_squares", lambda W: (calls.append(1), real(W))[1])
    case = adapted(training=True)
    calls.clear()
    for _ in range(3):
        case.model(case.x).sum().backward()
    assert len(calls) <= 1
    case.model.layer.weight.requires_grad_(True)
    for _ in range(2):
        case.model(case.x)
    assert len(calls) >= 2, "a base that trains along is summed each time"
