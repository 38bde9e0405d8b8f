"""LoRA's settings: what they mean and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core import Shape
from lorakit.errors import ConfigError, UnmatchedTargetError, UnsupportedTargetError
from lorakit.targets import find
from tests.contracts.kinds import Host


@pytest.mark.parametrize(
    ("scaling", "r", "alpha", "scale"),
    [
        ("lora", 16, 16, 1.0),
        ("rslora", 16, 16, 4.0),
        ("rslora", 64, 16, 2.0),
        ("lora", 8, 32, 4.0),
        ("lora", 4, -2, -0.5),
    ],
)
def test_the_scale(scaling: str, r: int, alpha: float, scale: float) -> None:
    assert lk.LoRA(r=r, alpha=alpha, scaling=scaling).scale == pytest.approx(scale, rel=1e-15)


def test_doubling_the_rank_divides_the_scale_of_rslora_by_the_root_of_two() -> None:
    one, two = (lk.LoRA(r=r, alpha=16, scaling="rslora").scale for r in (8, 16))
    assert one / two == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "at least 1; got r=0"),
        ({"r": -3}, "at least 1; got r=-3"),
        ({"r": 2.0}, "whole number.*2.0"),
        ({"r": True}, "whole number.*True"),
        ({"r": "8"}, "whole number.*'8'"),
        ({"rank_pattern": {"q_proj": 0}}, "at least 1; got r=0"),
        ({"alpha": float("nan")}, "alpha must be a finite number; got nan"),
        ({"alpha": float("inf")}, "alpha must be a finite number; got inf"),
        ({"alpha": "16"}, "alpha must be a finite number; got '16'"),
        ({"alpha": None}, "alpha must be a finite number; got None"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha must be a finite number"),
        ({"dropout": 1.0}, r"dropout is a probability in \[0, 1\); got 1.0"),
        ({"dropout": -0.1}, "got -0.1"),
        ({"dropout": float("nan")}, "got nan"),
        ({"dropout": "0.1"}, "got '0.1'"),
        ({"scaling": "rs_lora"}, "No scaling is called 'rs_lora'. Did you mean 'rslora'"),
        ({"init": "kaimng"}, "No init is called 'kaimng'. Did you mean 'kaiming'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lk.LoRA(**settings)


@pytest.mark.parametrize(
    ("layer", "most"),
    [
        (nn.Linear(6, 4), 4),
        (nn.Embedding(9, 5), 5),
        (nn.Conv2d(4, 6, 3, groups=2), 3),
        (nn.Conv1d(1, 8, 2), 2),
    ],
    ids=["linear", "embedding", "groups", "conv"],
)
def test_a_rank_that_no_matrix_here_can_have(layer: nn.Module, most: int) -> None:
    model = Host(layer)
    with pytest.raises(ConfigError, match=rf"r={most + 1} .*'layer'.*at most {most}.*rank_pattern"):
        lk.attach(model, lk.LoRA(r=most + 1), ["layer"])
    assert not any("lorakit" in name for name, _ in model.named_modules()), "nothing was touched"
    assert all(p.requires_grad for p in model.parameters())
    report = lk.attach(model, lk.LoRA(r=most), ["layer"])
    assert report.sites[0].rank == most


def test_a_vector_has_rank_one() -> None:
    model = Host(nn.LayerNorm(6))
    with pytest.raises(ConfigError, match="at most 1"):
        lk.attach(model, lk.LoRA(r=2), ["layer.weight"])
    x = torch.randn(3, 6)
    before = model(x)
    lk.attach(model, lk.LoRA(r=1, alpha=1), ["layer.weight"])
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("shape", "bias", "count"),
    [
        (Shape("linear", out=5, in_=4), False, 2 * (5 + 4)),
        (Shape("linear", out=5, in_=4), True, 2 * (5 + 4) + 5),
        (Shape("conv", out=3, in_=18, batch=(2,), kernel=(3, 3)), True, 2 * 2 * (3 + 18) + 6),
        (Shape("parameter", out=5, in_=4, batch=(3, 2)), False, 6 * 2 * (5 + 4)),
    ],
)
def test_shapes_are_counted_from_facts_alone(shape: Shape, bias: bool, count: int) -> None:
    sizes = lk.LoRA(r=2, bias=bias).shapes(shape).values()
    assert sum(torch.Size(s).numel() for s in sizes) == count


def test_patterns_give_a_target_its_own_rank_and_alpha() -> None:
    method = lk.LoRA(
        r=8, alpha=16, rank_pattern={"up_proj": 4, r".*\.1\..*": 2, "^q": 3}, alpha_pattern={"up_proj": 1.0}
    )
    assert method.for_path("layers.0.q_proj") == lk.LoRA(r=8, alpha=16)
    assert method.for_path("layers.1.up_proj") == lk.LoRA(r=4, alpha=1.0), "the first that matches"
    assert method.for_path("layers.1.q_proj") == lk.LoRA(r=2, alpha=16)
    assert method.for_path("q") == lk.LoRA(r=3, alpha=16)
    assert set(method.patterns()) == {"up_proj", r".*\.1\..*", "^q"}


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(UnmatchedTargetError, match=r"'layr'.*matches none.*Did you mean 'layer'"):
        lk.attach(Host(nn.Linear(4, 4)), lk.LoRA(r=2, rank_pattern={"layr": 1}))


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        (lk.LoRA(r=2, dropout=0.1), "in_proj_weight", "no input to drop.*dropout=0"),
        (lk.LoRA(r=2, bias=True), "out_proj", "no bias of its own.*bias=False"),
    ],
    ids=["dropout", "bias"],
)
def test_what_needs_a_call_is_refused_where_there_is_none(method: lk.LoRA, name: str, message: str) -> None:
    with pytest.raises(UnsupportedTargetError, match=f"LoRA cannot adapt .*{name}.*{message}"):
        lk.attach(nn.MultiheadAttention(4, 2), method, [name])


def test_a_bias_for_a_lookup_is_refused() -> None:
    with pytest.raises(UnsupportedTargetError, match="linear or convolution layer, not an embedding"):
        lk.attach(Host(nn.Embedding(9, 4)), lk.LoRA(r=2, bias=True), ["layer"])


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv1d(6, 5, 1)], ids=["linear", "conv"])
def test_dropout_acts_in_training_only_and_keeps_the_mean(layer: nn.Module) -> None:
    torch.manual_seed(0)
    model = Host(layer).double()
    lk.attach(model, lk.LoRA(r=2, dropout=0.5), ["layer"], name="a", dtype=torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lorakit" in name:
                p.normal_()
    x = torch.randn(3, 6, 1, dtype=torch.float64)
    x = x.squeeze(-1) if isinstance(layer, nn.Linear) else x
    model.eval()
    exact = model(x)
    assert torch.equal(model(x), exact)
    with lk.use(model, None):
        base = model(x)
    model.train()
    with torch.no_grad():
        runs = torch.stack([model(x) for _ in range(4000)])
    spread = runs.std(0)
    assert (spread > 0).all()
    assert ((runs.mean(0) - exact).abs() < 5 * spread / 4000**0.5).all()
    with lk.use(model, None):
        assert torch.equal(model(x), base)
    torch.manual_seed(1)
    one = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), one)


def test_gradients_at_the_start_are_those_of_the_reference() -> None:
    """With ``B = 0``: ``dA = 0`` exactly and ``dB = s G A^T`` (methods reference, U3)."""
    torch.manual_seed(0)
    model = Host(nn.Linear(6, 5)).double()
    lk.attach(model, lk.LoRA(r=2, alpha=3), ["layer"], dtype=torch.float64)
    A, B = (p for n, p in model.named_parameters() if "lorakit" in n)
    x, g = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    (model(x) * g).sum().backward()
    assert A.grad is not None
    assert (A.grad == 0).all()
    torch.testing.assert_close(B.grad, 1.5 * (g.T @ x) @ A.detach().T, rtol=1e-13, atol=1e-13)


def test_a_rank_of_the_smaller_side_reaches_any_change() -> None:
    torch.manual_seed(0)
    D = torch.randn(5, 6, dtype=torch.float64)
    U, S, V = torch.linalg.svd(D, full_matrices=False)
    (target,) = find(Host(nn.Linear(6, 5)).double(), ["layer"])
    method = lk.LoRA(r=5, alpha=10)
    torch.testing.assert_close(method.delta(target, {"lora_A": V, "lora_B": U * S / 2}), D)


def test_the_roles_of_the_parameters() -> None:
    factors = {"lora_A": "A", "lora_B": "B", "start_A": "A", "start_B": "B"}
    assert lk.LoRA.roles == {**factors, "lora_bias": "bias"}


# ---- measured from its start ----------------------------------------------------------------------------------------
def moved(method: lk.LoRA | lk.DoRA, layer: nn.Module, dtype: torch.dtype = torch.float64) -> Host:
    """A model whose adapter was trained a little."""
    torch.manual_seed(0)
    model = Host(layer).to(dtype)
    lk.attach(model, method, ["layer"], dtype=dtype)
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_gradients_at_a_start_that_is_not_zero_are_those_of_the_reference() -> None:
    """``dA = s Bᵀ G`` and ``dB = s G Aᵀ``: as of ``s B A``, the start being constant."""
    torch.manual_seed(0)
    model = Host(nn.Linear(6, 5)).double()
    lk.attach(model, lk.LoRA(r=2, alpha=3, init="pissa"), ["layer"], dtype=torch.float64)
    p = {n.rsplit(".", 1)[-1]: q for n, q in model.named_parameters() if "lorakit" in n}
    x, g = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    (model(x) * g).sum().backward()
    G = g.T @ x
    torch.testing.assert_close(p["lora_A"].grad, 1.5 * p["lora_B"].detach().T @ G, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p["lora_B"].grad, 1.5 * G @ p["lora_A"].detach().T, rtol=1e-12, atol=1e-12)
    assert not p["start_A"].requires_grad
    assert not p["start_B"].requires_grad


@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(6, 5), lambda: nn.Embedding(9, 6), lambda: nn.Conv2d(4, 6, 3, groups=2)]
)
@pytest.mark.parametrize(("scaling", "alpha"), [("lora", 6.0), ("rslora", 3 * 2**0.5)])
def test_a_subtracted_start_is_a_plain_lora_of_twice_the_rank(
    layer: Callable[[], nn.Module], scaling: str, alpha: float
) -> None:
    model = moved(lk.LoRA(r=2, alpha=3, scaling=scaling, init="olora", dropout=0.1), layer())
    state = lk.extract(model)
    plain = state.plain()
    method = plain.spec.methods["layer"]
    assert isinstance(method, lk.LoRA)
    assert (method.r, method.scaling, method.init, method.dropout) == (4, scaling, "kaiming", 0.1)
    assert method.alpha == pytest.approx(alpha, rel=1e-15)
    was = state.spec.methods["layer"]
    assert isinstance(was, lk.LoRA)
    assert method.scale == pytest.approx(was.scale, rel=1e-15)
    p, q = state.tensors["layer"], plain.tensors["layer"]
    assert q.keys() == {"lora_A", "lora_B"}
    change = p["lora_B"] @ p["lora_A"] - p["start_B"] @ p["start_A"]
    torch.testing.assert_close(q["lora_B"] @ q["lora_A"], change, rtol=0, atol=1e-14)
    assert plain.plain() is plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrap", [lambda lora: lora, lk.DoRA], ids=["lora", "dora"])
def test_the_plain_form_computes_the_same_bits(wrap: Any, dtype: torch.dtype) -> None:
    model = moved(wrap(lk.LoRA(r=4, alpha=8, init="pissa")), nn.Linear(30, 20), dtype)
    x = torch.randn(7, 30, dtype=dtype)
    with torch.no_grad():
        y = model(x)
        state = lk.extract(model).plain()
        lk.attach(model, state, name="plain")
        with lk.use(model, "plain"):
            assert torch.equal(model(x), y)


def test_the_difference_form_loses_nothing_to_cancellation() -> None:
    """A small step away from a large start, in bf16: ``s B A - s B_0 A_0`` drowns in the rounding of both terms."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    model = Host(layer)
    lk.attach(model, lk.LoRA(r=8, alpha=8, init="pissa"), ["layer"])
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.add_(1e-3 * torch.randn_like(p))
    state = lk.extract(model)
    t = {name: value.double() for name, value in state.tensors["layer"].items()}
    x = torch.randn(100, 64).bfloat16()
    exact = x.double() @ (t["lora_B"] @ t["lora_A"] - t["start_B"] @ t["start_A"]).mT
    A, B, _ = state.spec.methods["layer"].factors(layer, state.tensors["layer"])  # type: ignore[attr-defined]
    ours = (x @ A.bfloat16().mT @ B.bfloat16().mT).double()
    low = {name: value.bfloat16() for name, value in t.items()}
    naive = (x @ low["lora_A"].mT @ low["lora_B"].mT - x @ low["start_A"].mT @ low["start_B"].mT).double()
    assert (ours - exact).norm() < 0.02 * exact.norm()
    assert (naive - exact).norm() > 0.3 * exact.norm()


def test_every_target_has_its_own_start() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    wrapped = Host(model)
    before = wrapped(x := torch.randn(3, 8))
    method = lk.LoRA(r=2, init="pissa", rank_pattern={r"layer\.1": 4}, alpha_pattern={r"layer\.1": 1})
    lk.attach(wrapped, method, ["0", "1"])
    assert torch.equal(wrapped(x), before)
    tensors = lk.extract(wrapped).tensors
    assert tensors["layer.0"]["start_A"].shape == (2, 8)
    assert tensors["layer.1"]["start_A"].shape == (4, 6)
