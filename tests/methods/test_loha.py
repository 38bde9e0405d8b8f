"""LoHa: rank, starts, gradients, the Tucker form, and PEFT's numbers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core import Shape
from lorakit.errors import ConfigError
from tests.contracts.kinds import Host
from tests.contracts.pairs import close


def own(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters at ``layer``."""
    return {n.rsplit(".", 1)[-1]: p for n, p in model.named_parameters() if ".lorakit." in n}


def change(model: nn.Module) -> Tensor:
    """What merging adds to the layer's weight."""
    before = model.layer.weight.detach().clone()
    lk.merge(model)
    after = model.layer.weight.detach().clone()
    lk.unmerge(model)
    return after - before


# ---- the formula -----------------------------------------------------------------------------------------------------
def test_the_rank_of_the_change_is_the_square_of_r() -> None:
    torch.manual_seed(0)
    model = Host(nn.Linear(20, 30)).double()
    lk.attach(model, lk.LoHa(r=3), ["layer"])
    with torch.no_grad():
        for p in own(model).values():
            p.normal_()
    assert torch.linalg.matrix_rank(change(model)) == 9
    assert sum(p.numel() for p in own(model).values()) == 2 * 3 * (20 + 30)


def test_the_closed_form_gradients() -> None:
    """``dB1 = s (D * B2 A2) A1^T`` and its three companions, with ``D`` the gradient that the dense layer would see."""
    torch.manual_seed(0)
    model = Host(nn.Linear(5, 4)).double()
    lk.attach(model, lk.LoHa(r=2, alpha=3), ["layer"])
    p = own(model)
    with torch.no_grad():
        for t in p.values():
            t.normal_()
    x, G = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    (model(x) * G).sum().backward()
    D, s = G.T @ x, 1.5
    B1, A1, B2, A2 = (p[f"hada_w{k}"].detach() for k in ("1_a", "1_b", "2_a", "2_b"))
    close(p["hada_w1_a"].grad, s * (D * (B2 @ A2)) @ A1.T, 1e-12)
    close(p["hada_w1_b"].grad, s * B1.T @ (D * (B2 @ A2)), 1e-12)
    close(p["hada_w2_a"].grad, s * (D * (B1 @ A1)) @ A2.T, 1e-12)
    close(p["hada_w2_b"].grad, s * B2.T @ (D * (B1 @ A1)), 1e-12)


@pytest.mark.parametrize(("init", "zero"), [("peft", "hada_w2_b"), ("lycoris", "hada_w2_a")])
@pytest.mark.parametrize("tucker", [False, True])
def test_at_the_start_only_the_zero_factor_moves(init: str, zero: str, tucker: bool) -> None:
    model = Host(nn.Conv2d(4, 6, 3))
    lk.attach(model, lk.LoHa(r=2, init=init, tucker=tucker), ["layer"], seed=0)
    model(torch.randn(2, 4, 5, 5)).square().sum().backward()
    for name, p in own(model).items():
        assert p.detach().any() == (name != zero), name
        assert p.grad is not None
        assert p.grad.any() == (name == zero), name


def test_the_starts_are_those_of_the_two_libraries() -> None:
    wide = Host(nn.Linear(400, 900))
    lk.attach(wide, lk.LoHa(r=16), ["layer"], seed=0)
    for name, fan_in in (("hada_w1_a", 16), ("hada_w1_b", 400), ("hada_w2_a", 16)):
        bound = fan_in**-0.5
        assert 0.99 * bound < float(own(wide)[name].detach().abs().max()) <= bound, name
    lk.detach(wide)
    lk.attach(wide, lk.LoHa(r=16, init="lycoris"), ["layer"], seed=0)
    for name, deviation in (("hada_w1_a", 0.1), ("hada_w1_b", 1.0), ("hada_w2_b", 1.0)):
        assert float(own(wide)[name].detach().std()) == pytest.approx(deviation, rel=0.03), name


@pytest.mark.parametrize("init", ["peft", "lycoris"])
def test_the_padding_row_of_an_embedding_is_left_alone(init: str) -> None:
    torch.manual_seed(0)
    model = Host(nn.Embedding(9, 4, padding_idx=2))
    lk.attach(model, lk.LoHa(r=2, init=init), ["layer"], seed=0)
    optimizer = torch.optim.SGD(lk.trainable(model).values(), lr=0.1)
    for _ in range(3):
        model(torch.arange(9)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = change(model).abs().sum(1) > 0
    assert moved.tolist() == [True, True, False, *[True] * 6]


# ---- Tucker ----------------------------------------------------------------------------------------------------------
def test_the_tucker_form_counts_channels() -> None:
    shape = Shape("conv", out=64, in_=32 * 9, kernel=(3, 3))
    count = {
        t: sum(torch.Size(s).numel() for s in lk.LoHa(r=4, tucker=t).shapes(shape).values())
        for t in (False, True)
    }
    assert count == {False: 2 * 4 * (64 + 32 * 9), True: 2 * (4 * (64 + 32) + 4 * 4 * 9)}


@pytest.mark.parametrize(
    "shape", [Shape("linear", 8, 6), Shape("conv", 8, 6, kernel=(1, 1))], ids=["linear", "1x1"]
)
def test_without_kernel_positions_there_is_no_core(shape: Shape) -> None:
    assert lk.LoHa(r=2, tucker=True).shapes(shape) == lk.LoHa(r=2).shapes(shape)


# ---- settings --------------------------------------------------------------------------------------------------------
def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"No init of LoHa is called 'lycori'.*Did you mean 'lycoris'"):
        lk.LoHa(init="lycori")
    with pytest.raises(ConfigError, match=r"r=5 is more than a 4 x 6 matrix.*at most 4.*rank_pattern"):
        lk.attach(Host(nn.Linear(6, 4)), lk.LoHa(r=5), ["layer"])


# ---- PEFT ------------------------------------------------------------------------------------------------------------
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 8), (3, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 7)),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["32", "64"]
)
@pytest.mark.parametrize("tucker", [False, True], ids=["unfolded", "tucker"])
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_gradients_and_merge_are_those_of_peft(
    layer: str, tucker: bool, dtype: torch.dtype, tolerance: float
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    build, size = LAYERS[layer]
    model = Host(build()).to(dtype)
    config = peft.LoHaConfig(r=2, alpha=3, use_effective_conv2d=tucker, target_modules=["layer"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), config).to(dtype)
    lk.attach(model, lk.LoHa(r=2, alpha=3, tucker=tucker), ["layer"])
    assert (lk.LoHa().r, lk.LoHa().alpha) == (config.__class__().r, config.__class__().alpha)
    mine = own(model)
    others = {name: getattr(theirs.base_model.model.layer, name)["default"] for name in mine}
    for i, (name, p) in enumerate(mine.items()):
        with torch.no_grad():
            if i % 2:  # half of the weights go one way, half the other way
                p.copy_(others[name].normal_().reshape(p.shape))
            else:
                others[name].copy_(p.normal_().reshape(others[name].shape))
    x = torch.randn(size, dtype=dtype)
    y, want = model(x), theirs(x)
    close(y, want, tolerance)
    G = torch.randn_like(y)
    got = torch.autograd.grad(y, list(mine.values()), G)
    expected = torch.autograd.grad(want, list(others.values()), G)
    for name, one, other in zip(mine, got, expected, strict=True):
        if not (name.endswith("_a") and "hada_t1" in mine):  # see the next test
            close(one, other.reshape(one.shape), 2 * tolerance)
    lk.merge(model, permanent=True)
    close(model.layer.weight, theirs.merge_and_unload().layer.weight, tolerance)


def test_pefts_gradients_of_two_tucker_factors_are_those_of_other_tensors() -> None:
    """Its closed form (LyCORIS's) takes ``t2`` and ``hada_w2_b`` for the gradient of ``hada_w1_a``, and the reverse."""
    layers = pytest.importorskip("peft.tuners.loha.layer")
    torch.manual_seed(0)
    model = Host(nn.Conv2d(4, 6, 3)).double()
    lk.attach(model, lk.LoHa(r=2, alpha=2, tucker=True), ["layer"])
    mine = own(model)
    with torch.no_grad():
        for p in mine.values():
            p.normal_()
    G = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    names = [f"hada_{part}" for part in ("t1", "w1_a", "w1_b", "t2", "w2_a", "w2_b")]
    tensors = [mine[name].detach().clone().requires_grad_() for name in names]
    W = layers.make_weight_cp(*tensors, torch.tensor(1.0))
    theirs = dict(zip(names, torch.autograd.grad(W, tensors, G), strict=True))
    sides = [torch.einsum("ijkl,ip,jr->prkl", *tensors[i : i + 3]) for i in (0, 3)]
    close(W, sides[0] * sides[1], 1e-12)
    right = dict(zip(names, torch.autograd.grad(sides[0] * sides[1], tensors, G), strict=True))
    got = dict(
        zip(
            names,
            torch.autograd.grad(own_delta(model), [mine[name] for name in names], G.flatten(1)),
            strict=True,
        )
    )
    for name in names:
        close(got[name], right[name], 1e-12)
        assert torch.allclose(theirs[name], right[name]) == (not name.endswith("_a")), name


def own_delta(model: nn.Module) -> Tensor:
    """The adapter's change at ``layer``, differentiable."""
    (target,) = lk.find(model, ["layer"])
    method = lk.extract(model).spec.methods["layer"]
    assert isinstance(method, lk.LoHa)
    return method.delta(target, own(model))
