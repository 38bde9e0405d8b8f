"""LoKr: factors of sizes, counts, scales, the product without a Kronecker product, and PEFT's numbers."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lorakit as lk
from lorakit.core import Shape
from lorakit.errors import ConfigError
from lorakit.methods.lokr import factorize
from tests.contracts.kinds import Host
from tests.contracts.pairs import close
from tests.methods.test_loha import LAYERS, change, own


# ---- factors of sizes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "factor", "pair"),
    [
        (128, -1, (8, 16)),
        (1024, -1, (32, 32)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (128, 16, (8, 16)),
        (250, 4, (2, 125)),
        (250, 16, (10, 25)),
        (360, 8, (8, 45)),
        (360, 16, (15, 24)),
        (360, -1, (18, 20)),
        (1, -1, (1, 1)),
        (5, 7, (1, 5)),
    ],
)
def test_sizes_are_split(size: int, factor: int, pair: tuple[int, int]) -> None:
    assert factorize(size, factor) == pair


def test_the_split_is_that_of_peft_but_for_the_order() -> None:
    """PEFT documents that the first is not the larger one, and returns (32, 4) for ``128, factor=32``."""
    theirs = pytest.importorskip("peft.tuners.lokr.layer").factorization
    assert theirs(128, 32) == (32, 4)
    assert factorize(128, 32) == (4, 32)
    for size in range(1, 200):
        for factor in (-1, 1, 2, 3, 4, 5, 8, 12, 16, 40, 300):
            one, other = theirs(size, factor), factorize(size, factor)
            assert factorize(size, factor, "factor") == one
            assert other == tuple(sorted(one)), (size, factor)
            assert one == other or (size % factor == 0 and factor**2 > size)


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [
        ({"r": 8}, (1024, 1024), {"lokr_w1": (32, 32), "lokr_w2_a": (32, 8), "lokr_w2_b": (8, 32)}),
        ({"r": 16}, (1024, 1024), {"lokr_w1": (32, 32), "lokr_w2": (32, 32)}),
        (
            {"r": 8, "decompose_both": True},
            (1024, 1024),
            {"lokr_w1_a": (32, 8), "lokr_w1_b": (8, 32), "lokr_w2_a": (32, 8), "lokr_w2_b": (8, 32)},
        ),
        ({"r": 8, "factor": 4}, (128, 64), {"lokr_w1": (4, 4), "lokr_w2_a": (32, 8), "lokr_w2_b": (8, 16)}),
    ],
    ids=["low-rank", "full", "both", "factor"],
)
def test_shapes(
    settings: dict[str, Any], size: tuple[int, int], expected: dict[str, tuple[int, ...]]
) -> None:
    assert lk.LoKr(**settings).shapes(Shape("linear", *size)) == expected


def test_the_count_for_a_square_matrix() -> None:
    shapes = lk.LoKr(r=8).shapes(Shape("linear", 1024, 1024))
    assert sum(torch.Size(s).numel() for s in shapes.values()) == 1_024 + 512


@pytest.mark.parametrize(
    ("tucker", "expected"),
    [
        (False, {"lokr_w1": (2, 2, 3), "lokr_w2_a": (2, 4, 1), "lokr_w2_b": (2, 1, 36)}),
        (
            True,
            {
                "lokr_w1": (2, 2, 3),
                "lokr_t2": (2, 1, 1, 3, 3),
                "lokr_w2_a": (2, 1, 4),
                "lokr_w2_b": (2, 1, 4),
            },
        ),
    ],
)
def test_a_grouped_kernel(tucker: bool, expected: dict[str, tuple[int, ...]]) -> None:
    shape = Shape("conv", out=8, in_=12 * 9, batch=(2,), kernel=(3, 3))
    assert lk.LoKr(r=1, tucker=tucker).shapes(shape) == expected
    assert lk.LoKr(r=2).shapes(shape) == {"lokr_w1": (2, 2, 3), "lokr_w2": (2, 4, 4, 3, 3)}


# ---- the formula -----------------------------------------------------------------------------------------------------
def random_layer(layer: nn.Module, method: lk.LoKr) -> Host:
    torch.manual_seed(0)
    model = Host(layer).double()
    lk.attach(model, method, ["layer"])
    with torch.no_grad():
        for p in own(model).values():
            p.normal_()
    return model


def test_the_change_is_the_kronecker_product() -> None:
    model = random_layer(nn.Linear(30, 42), lk.LoKr(r=2, alpha=3))
    p = own(model)
    W1, W2 = p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"]
    close(change(model), 1.5 * torch.kron(W1, W2), 1e-12)
    rank = torch.linalg.matrix_rank
    assert rank(change(model)) == rank(W1) * rank(W2) == 5 * 2


def test_both_factors_low_rank() -> None:
    model = random_layer(nn.Linear(64, 64), lk.LoKr(r=2, decompose_both=True))
    p = own(model)
    assert set(p) == {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"}
    W1, W2 = p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2_a"] @ p["lokr_w2_b"]
    close(change(model), 4 * torch.kron(W1, W2), 1e-11)
    x = torch.randn(3, 64, dtype=torch.float64)
    close(
        model(x) - nn.functional.linear(x, model.layer.weight, model.layer.bias), x @ change(model).T, 1e-11
    )


def test_a_linear_layer_never_forms_the_product() -> None:
    model = random_layer(nn.Linear(256, 256), lk.LoKr(r=4, factor=16))
    x = torch.randn(2, 256, dtype=torch.float64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    base, factor = 2 * 2 * 256 * 256, 2 * 16 * 4 * 16
    assert counter.get_total_flops() == base + factor + 2 * 2 * (256 * 16 + 256 * 16)


@pytest.mark.parametrize(("init", "zero"), [("peft", "lokr_w1"), ("lycoris", "lokr_w2")])
@pytest.mark.parametrize("settings", [{"r": 2}, {"r": 20}, {"r": 2, "decompose_both": True}], ids=str)
def test_at_the_start_only_the_zero_factor_moves(init: str, zero: str, settings: dict[str, Any]) -> None:
    model = Host(nn.Linear(64, 64))
    lk.attach(model, lk.LoKr(init=init, **settings), ["layer"], seed=0)
    model(torch.randn(3, 64)).square().sum().backward()
    # PEFT zeroes the left part of a low-rank W1, both libraries the right part of a low-rank W2.
    zeros = {"lokr_w1": ("lokr_w1", "lokr_w1_a"), "lokr_w2": ("lokr_w2", "lokr_w2_b")}[zero]
    for name, p in own(model).items():
        assert p.detach().any() == (name not in zeros), name
        assert p.grad is not None
        assert p.grad.any() == (name in zeros), name


@pytest.mark.parametrize(
    ("scaling", "r", "expected"),
    [("peft", 1000, 0.004), ("lycoris", 1000, 1.0), ("peft", 2, 2.0), ("lycoris", 2, 2.0)],
)
def test_the_scale_where_both_factors_are_full(scaling: str, r: int, expected: float) -> None:
    """LyCORIS takes 1 there, PEFT ``alpha / r`` with a rank that has no other meaning."""
    model = random_layer(nn.Linear(64, 64, bias=False), lk.LoKr(r=r, alpha=4, scaling=scaling))
    p = own(model)
    W2 = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
    close(change(model), expected * torch.kron(p["lokr_w1"], W2), 1e-12)


# ---- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 0}, "factor must be -1 or"),
        ({"factor": -2}, "got -2"),
        ({"factor": True}, "got True"),
        ({"init": "peff"}, "Did you mean 'peft'"),
        ({"scaling": "lora"}, "No scaling of LoKr is called 'lora'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lk.LoKr(**settings)


# ---- PEFT ------------------------------------------------------------------------------------------------------------
def both(
    layer: nn.Module, dtype: torch.dtype, **settings: Any
) -> tuple[Host, Any, dict[str, Tensor], dict[str, Tensor]]:
    """One layer under our LoKr and under PEFT's, with the same numbers; half of them copied each way."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Host(layer).to(dtype)
    words = {"tucker": "use_effective_conv2d", "factor": "decompose_factor", "init": "init_weights"}
    config = peft.LoKrConfig(target_modules=["layer"], **{words.get(k, k): v for k, v in settings.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), config).to(dtype)
    lk.attach(model, lk.LoKr(**settings), ["layer"])
    mine = own(model)
    others = {name: getattr(theirs.base_model.model.layer, name)["default"] for name in mine}
    for i, (name, p) in enumerate(mine.items()):
        with torch.no_grad():
            if i % 2:
                p.copy_(others[name].normal_().reshape(p.shape))
            else:
                others[name].copy_(p.normal_().reshape(others[name].shape))
    return model, theirs, mine, others


FORMS: dict[str, dict[str, Any]] = {
    "low-rank": {"r": 1, "alpha": 3},
    "full": {"r": 9, "alpha": 3},
    "tucker": {"r": 1, "alpha": 3, "tucker": True},
    "factor": {"r": 1, "alpha": 3, "factor": 2},
}
AGAINST_PEFT = {**LAYERS, "conv1d-wide": (lambda: nn.Conv1d(64, 64, 3), (2, 64, 5))}
# A full W2 is another tensor there, see the next test; with cores of rank one PEFT's torch.kron refuses its strides.
NOT_IN_PEFT = {("conv1d", "full"), ("conv1d", "tucker"), ("conv1d-wide", "full")}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["32", "64"]
)
@pytest.mark.parametrize(
    ("layer", "form"), [(k, f) for k in AGAINST_PEFT for f in FORMS if (k, f) not in NOT_IN_PEFT]
)
def test_outputs_gradients_and_merge_are_those_of_peft(
    layer: str, form: str, dtype: torch.dtype, tolerance: float
) -> None:
    build, size = AGAINST_PEFT[layer]
    settings = {**FORMS[form], "r": 2} if layer == "conv1d-wide" else FORMS[form]
    model, theirs, mine, others = both(build(), dtype, **settings)
    x = torch.randn(size, dtype=dtype)
    y, want = model(x), theirs(x)
    close(y, want, tolerance)
    G = torch.randn_like(y)
    got = torch.autograd.grad(y, list(mine.values()), G)
    expected = torch.autograd.grad(want, list(others.values()), G)
    for one, other in zip(got, expected, strict=True):
        close(one, other.reshape(one.shape), 2 * tolerance)
    lk.merge(model, permanent=True)
    close(model.layer.weight, theirs.merge_and_unload().layer.weight, tolerance)


def test_both_factors_low_rank_as_in_peft() -> None:
    model, theirs, _, _ = both(nn.Linear(64, 64), torch.float64, r=2, alpha=3, decompose_both=True)
    x = torch.randn(3, 64, dtype=torch.float64)
    close(model(x), theirs(x), 1e-12)


def test_peft_mixes_channels_and_positions_in_a_full_conv1d() -> None:
    """Its ``torch.kron`` of a matrix and a 3-d ``W2`` aligns the last axes: columns of ``W1`` meet kernel positions.

    That is another tensor, of the same size, read as a kernel. With the positions as columns of ``W2``, as PEFT itself
    has it for ``Conv2d``, the change is a Kronecker product in every dimension.
    """
    model, theirs, mine, _ = both(nn.Conv1d(4, 6, 3), torch.float64, r=9, alpha=9)
    W1, W2 = mine["lokr_w1"], mine["lokr_w2"]
    delta = theirs.base_model.model.layer.get_delta_weight("default")
    close(delta, torch.kron(W1[None], W2).reshape(6, 4, 3), 1e-12)
    close(change(model), torch.stack([torch.kron(W1, W2[..., k]) for k in range(3)], -1), 1e-12)
    assert not torch.allclose(delta, change(model))


def test_defaults_are_those_of_peft() -> None:
    config = pytest.importorskip("peft").LoKrConfig()
    own = lk.LoKr()
    assert (own.r, own.alpha, own.factor) == (config.r, config.alpha, config.decompose_factor)
    assert (own.decompose_both, own.tucker) == (config.decompose_both, config.use_effective_conv2d)


# ---- which number comes first ----------------------------------------------------------------------------------------
def test_the_factor_itself_may_come_first(tmp_path: Path) -> None:
    shape = Shape("linear", out=12, in_=8)
    assert lk.LoKr(r=4, factor=8).shapes(shape) == {"lokr_w1": (3, 1), "lokr_w2": (4, 8)}
    assert lk.LoKr(r=4, factor=8, first="factor").shapes(shape) == {"lokr_w1": (3, 8), "lokr_w2": (4, 1)}
    with pytest.raises(ConfigError, match="first of LoKr"):
        lk.LoKr(first="larger")
    for first, written in (("smaller", "LORAKIT"), ("factor", "LOKR")):
        model = nn.Sequential(nn.Linear(8, 12))
        lk.attach(model, lk.LoKr(r=1, factor=8, first=first), targets=["0"], seed=0)
        lk.save(model, tmp_path / first)
        config = json.loads((tmp_path / first / "adapter_config.json").read_text())
        assert (config["peft_type"] == "LOKR") == (written == "LOKR")
        again = lk.read(tmp_path / first).spec.methods["0"]
        assert again.shapes(shape) == lk.LoKr(r=1, factor=8, first=first).shapes(shape)
    assert "first='smaller'" in str(config_of(tmp_path / "smaller"))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())  # type: ignore[no-any-return]
