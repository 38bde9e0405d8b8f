"""VeRA: shared projections, their seed, the published counts, and PEFT's numbers."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core import Shape
from lorakit.errors import ConfigError, UnsupportedTargetError
from tests.contracts.kinds import KINDS, Experts, Host
from tests.contracts.pairs import close


class Net(nn.Module):
    """Two layers of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Net().double()
    lk.attach(model, lk.VeRA(**{"r": 7, **settings}), ["up", "down"], name="a")
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.add_(torch.randn_like(p))
    return model


def slots(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Each layer's parameters, shared ones under every layer."""
    found: dict[str, dict[str, nn.Parameter]] = {"up": {}, "down": {}}
    for name, p in model.named_parameters(remove_duplicate=False):
        if ".lorakit." in name:
            found[name.split(".")[0]][name.rsplit(".", 1)[-1]] = p
    return found


# ---- sharing ---------------------------------------------------------------------------------------------------------
def by_cast(model: nn.Module) -> nn.Module:
    return model.to(torch.float32).to(torch.float64)


@pytest.mark.parametrize(
    "moved",
    [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_cast],
    ids=["fresh", "deepcopy", "pickle", "cast"],
)
def test_two_layers_share_storage(moved: Callable[[nn.Module], nn.Module]) -> None:
    model = moved(adapted())
    up, down = slots(model)["up"], slots(model)["down"]
    for name, size in (("vera_A", (7, 9)), ("vera_B", (9, 7))):
        assert up[name] is down[name]
        assert tuple(up[name].shape) == size
        assert not up[name].requires_grad
    assert up["vera_lambda_d"] is not down["vera_lambda_d"]


def test_a_copy_shares_nothing_with_the_original() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    assert slots(twin)["up"]["vera_A"].data_ptr() != slots(model)["up"]["vera_A"].data_ptr()


def test_a_smaller_layer_takes_the_first_rows_and_columns() -> None:
    model = adapted()
    for layer, base in (("up", model.up), ("down", model.down)):
        p = slots(model)[layer]
        out, in_ = base.weight.shape
        d, b = p["vera_lambda_d"], p["vera_lambda_b"]
        W = base.weight + b[:, None] * p["vera_B"][:out] @ (d[:, None] * p["vera_A"][:, :in_])
        x = torch.randn(3, in_, dtype=torch.float64)
        close(base(x), nn.functional.linear(x, W, base.bias), 1e-12)


def test_with_ones_the_change_is_the_product_of_the_projections() -> None:
    model = Host(nn.Linear(6, 8, bias=False))
    lk.attach(model, lk.VeRA(r=5), ["layer"])
    W = model.layer.weight.detach().clone()
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.fill_(1)
    shared = lk.extract(model).shared
    lk.merge(model)
    close(model.layer.weight - W, shared["vera_B"] @ shared["vera_A"], 1e-6)


def test_at_the_start_a_gradient_reaches_b_alone() -> None:
    model = Net()
    lk.attach(model, lk.VeRA(r=7), ["up", "down"])
    p = slots(model)["up"]
    assert torch.equal(p["vera_lambda_d"], torch.full((7,), 0.1))
    assert not p["vera_lambda_b"].any()
    model(torch.randn(4, 6)).square().sum().backward()
    assert not p["vera_lambda_d"].grad.any()  # type: ignore[union-attr]
    assert p["vera_lambda_b"].grad.abs().min() > 0  # type: ignore[union-attr]


def test_the_projections_come_from_their_own_seed() -> None:
    def projections(seed: int, projection_seed: int) -> tuple[Tensor, Tensor]:
        model = Net()
        lk.attach(model, lk.VeRA(r=7, projection_seed=projection_seed), ["up", "down"], seed=seed)
        shared = lk.extract(model).shared
        return shared["vera_A"], shared["vera_B"]

    torch.manual_seed(1)
    A, B = projections(0, 0)
    for torch_seed, seed in ((5, 0), (6, 3)):
        torch.manual_seed(torch_seed)
        again = projections(seed, 0)
        assert torch.equal(A, again[0])
        assert torch.equal(B, again[1])
    assert not torch.equal(A, projections(0, 1)[0])
    assert (6 / 9) ** 0.5 * 0.9 < A.abs().max() <= (6 / 9) ** 0.5
    assert (6 / 7) ** 0.5 * 0.9 < B.abs().max() <= (6 / 7) ** 0.5


@pytest.mark.parametrize("batch", [3, 2])
def test_a_stack_shares_the_projections_too(batch: int) -> None:
    model = KINDS["experts"].build() if batch == 3 else Host(nn.Conv2d(4, 6, 3, groups=2))
    assert isinstance(model.layer, Experts) or batch == 2
    lk.attach(model, lk.VeRA(r=5), ["layer.up" if batch == 3 else "layer"])
    state = lk.extract(model)
    ((path, own),) = state.tensors.items()
    shape = state.spec.shapes[path]
    assert {k: tuple(t.shape) for k, t in own.items()} == {
        "vera_lambda_d": (batch, 5),
        "vera_lambda_b": (batch, shape.out),
    }
    assert tuple(state.shared["vera_A"].shape) == (5, shape.in_)


# ---- counts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layers", "width", "r", "count"),
    [(12, 768, 1024, 43_008), (24, 1024, 256, 61_440), (24, 1024, 1024, 98_304)],
    ids=["roberta-base", "roberta-large", "gpt2-medium"],
)
def test_the_counts_of_the_paper(layers: int, width: int, r: int, count: int) -> None:
    sizes = lk.VeRA(r=r).shapes(Shape("linear", out=width, in_=width))
    assert layers * 2 * sum(torch.Size(s).numel() for s in sizes.values()) == count


def test_the_report_counts_the_shared_projections_once() -> None:
    model = Net()
    report = lk.attach(model, lk.VeRA(r=7), ["up", "down"])
    assert report.trainable == 7 + 9 + 7 + 5
    assert report.parameters == report.trainable + 2 * 7 * 9
    assert sum(p.numel() for p in lk.trainable(model).values()) == report.trainable


# ---- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "at least 1"),
        ({"d_initial": 0.0}, "other than 0"),
        ({"d_initial": float("nan")}, "finite"),
        ({"dropout": 1.0}, "probability"),
        ({"projection_seed": -1}, "projection_seed must be a whole number"),
        ({"max_in": 1.5}, "max_in must be a whole number"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lk.VeRA(**settings)


def test_larger_projections_can_be_asked_for_and_smaller_ones_are_refused() -> None:
    model = Net()
    lk.attach(model, lk.VeRA(r=2, max_in=12, max_out=20), ["up"])
    assert {k: tuple(t.shape) for k, t in lk.extract(model).shared.items()} == {
        "vera_A": (2, 12),
        "vera_B": (20, 2),
    }
    for settings, message in (
        ({"max_in": 8}, "9 columns.*made for 8"),
        ({"max_out": 8}, "9 rows.*made for 8"),
    ):
        with pytest.raises(UnsupportedTargetError, match=message):
            lk.attach(Net(), lk.VeRA(r=2, **settings), ["up", "down"])


def test_a_rank_above_the_size_of_the_layer_is_meant() -> None:
    lk.attach(Net(), lk.VeRA(r=100), ["up"])


def test_dropout_acts_in_training_only() -> None:
    model = adapted(dropout=0.5)
    x = torch.randn(4, 6, dtype=torch.float64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    with pytest.raises(UnsupportedTargetError, match="no input to drop"):
        lk.attach(KINDS["matrix"].build(), lk.VeRA(r=2, dropout=0.5), ["layer.proj"])


def test_no_product_of_the_size_of_a_is_made_for_the_gradient() -> None:
    """``A`` is used as it is: what autograd keeps is its storage, and none of its size beside it."""
    model = Host(nn.Linear(50, 4))
    lk.attach(model, lk.VeRA(r=30), ["layer"])
    A = lk.extract(model).shared["vera_A"]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(2, 50, requires_grad=True))
    (own,) = {t.data_ptr() for t in kept if t.numel() == A.numel()}
    assert own == next(p for n, p in model.named_parameters() if n.endswith("vera_A")).data_ptr()


# ---- PEFT ------------------------------------------------------------------------------------------------------------
def with_peft(model: nn.Module, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(
            copy.deepcopy(model), peft.VeraConfig(target_modules=["up", "down"], **settings)
        )


@pytest.mark.parametrize("seed", [0, 11])
def test_the_same_seed_gives_the_projections_of_peft_bit_for_bit(seed: int) -> None:
    theirs = with_peft(Net(), r=7, projection_prng_key=seed).base_model
    model = Net()
    lk.attach(model, lk.VeRA(r=7, projection_seed=seed), ["up", "down"])
    shared = lk.extract(model).shared
    assert torch.equal(shared["vera_A"], theirs.vera_A["default"])
    assert torch.equal(shared["vera_B"], theirs.vera_B["default"])
    assert lk.VeRA().r == 256
    assert (lk.VeRA().d_initial, lk.VeRA().projection_seed) == (0.1, 0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["32", "64"]
)
def test_outputs_gradients_and_merge_are_those_of_peft(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = Net().to(dtype)
    theirs = with_peft(model, r=7).to(dtype)
    lk.attach(model, lk.VeRA(r=7), ["up", "down"])
    ours = slots(model)
    pairs = []
    for layer in ("up", "down"):
        for name in ("vera_lambda_d", "vera_lambda_b"):
            other = getattr(getattr(theirs.base_model.model, layer), name)["default"]
            with torch.no_grad():
                if layer == "up":  # one layer's weights go one way, the other's the other way
                    ours[layer][name].copy_(other.normal_())
                else:
                    other.copy_(ours[layer][name].normal_())
            pairs.append((ours[layer][name], other))
    x = torch.randn(4, 6, dtype=dtype)
    y, want = model(x), theirs(x)
    close(y, want, tolerance)
    G = torch.randn_like(y)
    got = torch.autograd.grad(y, [mine for mine, _ in pairs], G)
    expected = torch.autograd.grad(want, [other for _, other in pairs], G)
    for one, other in zip(got, expected, strict=True):
        close(one, other, tolerance * 10)
    lk.merge(model, permanent=True)
    merged = theirs.merge_and_unload()
    for layer in ("up", "down"):
        close(getattr(model, layer).weight, getattr(merged, layer).weight, tolerance)
