"""AdaLoRA: the formula, PEFT's numbers, and leaving pruned triplets out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.adapters import spectrum
from lorakit.core import Shape
from lorakit.errors import ConfigError, UnsupportedTargetError
from tests.contracts.kinds import Host
from tests.contracts.pairs import Case, close, pairs, randomise


def pruned(case: Case, keep: int) -> dict[str, nn.Parameter]:
    """The parameters of a random adapter in which all but the last ``keep`` triplets of a matrix are masked."""
    p = case.parameters("a")
    with torch.no_grad():
        p["lora_E"][..., : p["lora_E"].shape[-2] - keep, :] = 0
    return p


@pytest.mark.parametrize("keep", [0, 1, 2])
@pairs(settings=("adalora", "dora_adalora"))
def test_pruned_triplets_can_be_left_out(setting: str, kind: str, keep: int) -> None:
    case = Case(kind)
    case.attach(setting)
    pruned(case, keep)
    least = case.kind.precision
    y = case.model(case.x)
    state = lk.extract(case.model, "a").compact()
    ((path, method),) = state.spec.methods.items()
    inner = method.inner if isinstance(method, lk.DoRA) else method
    assert isinstance(inner, lk.AdaLoRA)
    assert (inner.kept_r, inner.init_r) == (keep, 2)
    assert state.tensors[path]["lora_B"].shape[-1] == keep
    lk.attach(case.stock, state, name="a")
    close(case.stock(case.x), y, max(1e-14, least))
    lk.merge(case.stock, "a")
    close(case.stock(case.x), y, max(1e-12, least))
    lk.unmerge(case.stock)
    with lk.use(case.stock, {"a": 0.5}):
        with lk.use(case.model, {"a": 0.5}):
            half = case.model(case.x)
        close(case.stock(case.x), half, max(1e-14, least))


def test_leaving_out_nothing_changes_no_number() -> None:
    case = Case("linear")
    case.attach("adalora")
    state = lk.extract(case.model, "a")
    for name, tensor in state.compact().tensors["layer"].items():
        assert torch.equal(tensor, state.tensors["layer"][name])


def test_a_stack_keeps_as_many_as_its_fullest_matrix() -> None:
    shape = Shape("parameter", out=4, in_=5, batch=(3,), stored=(3, 4, 5))
    method = lk.AdaLoRA(init_r=3, target_r=1)
    p = {name: torch.randn(size, dtype=torch.float64) for name, size in method.shapes(shape).items()}
    p["lora_E"][0] = 0
    p["lora_E"][1, :2] = 0
    p["lora_E"][2, 1] = 0
    smaller, kept = method.compact(shape, p)
    assert smaller.kept_r == 2
    assert {name: tuple(t.shape) for name, t in kept.items()} == smaller.shapes(shape)
    change = [s * (B @ A) for A, B, s in (method.factors(shape, p), smaller.factors(shape, kept))]
    close(change[1], change[0], 1e-15)


def test_a_target_without_rank_is_saved_read_and_measured(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("a", nn.Linear(6, 5))
    model.add_module("b", nn.Linear(5, 4))
    lk.attach(model, lk.AdaLoRA(init_r=3, target_r=1), ["a", "b"], name="t", seed=0)
    with torch.no_grad():
        model.a.lorakit.output.t.lora_E[1] = 0.3
    x = torch.randn(7, 6)
    y = model(x)
    state = lk.extract(model, "t").compact()
    assert [state.spec.methods[path].kept_r for path in "ab"] == [1, 0]  # type: ignore[attr-defined]
    lk.detach(model)
    lk.attach(model, state, name="t")
    lk.save(model, tmp_path / "t", name="t")
    lk.detach(model)
    lk.load(model, tmp_path / "t", name="t")
    assert [lk.extract(model, "t").spec.methods[path].kept_r for path in "ab"] == [1, 0]  # type: ignore[attr-defined]
    close(model(x), y, 1e-6)
    found = spectrum(state, "b")
    assert found is not None
    assert (found.top, found.frobenius, found.effective_rank) == (0, 0, 0)


def test_the_scale_keeps_the_rank_at_the_start() -> None:
    assert lk.AdaLoRA().scale == pytest.approx(8 / 12.00001, rel=1e-12)
    assert lk.AdaLoRA(init_r=12, kept_r=3).scale == lk.AdaLoRA(init_r=12).scale


def test_the_count_of_the_paper() -> None:
    """72 modules of DeBERTaV3-base: 165,888 r for the factors (methods.md, section 5), and r singular values each."""
    sizes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    shapes = [lk.AdaLoRA(init_r=8).shapes(Shape("linear", out=o, in_=i)) for o, i in sizes]
    factors = sum(torch.Size(s["lora_A"]).numel() + torch.Size(s["lora_B"]).numel() for s in shapes)
    assert 12 * factors == 165_888 * 8 == 1_327_104
    assert 12 * sum(torch.Size(s["lora_E"]).numel() for s in shapes) == 72 * 8


LAYERS: Mapping[str, Any] = {
    "linear": (lambda: nn.Linear(7, 9), lambda: torch.randn(4, 7)),
    "hfconv1d": (lambda: Conv1D(9, 7), lambda: torch.randn(4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 3, 6, 7)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_gradients_and_merged_weights_are_those_of_peft(kind: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    build, draw = LAYERS[kind]
    layer, x = build(), draw()
    ours = Host(layer)
    theirs = peft.get_peft_model(
        Host(copy.deepcopy(layer)),
        peft.AdaLoraConfig(target_modules=["layer"], init_r=4, target_r=2, lora_alpha=6, total_step=9),
    )
    wrapped = theirs.base_model.model.layer
    lk.attach(ours, lk.AdaLoRA(init_r=4, target_r=2, alpha=6), ["layer"], name="default")
    own = layer.lorakit.output.default._parameters
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(torch.randn(p.shape))
            getattr(wrapped, name)["default"].copy_(p)
    y, z = ours(x), theirs(x)
    close(y, z, 1e-6)
    G = torch.randn(y.shape)
    (y * G).sum().backward()
    (z * G).sum().backward()
    for name, p in own.items():
        close(p.grad, getattr(wrapped, name)["default"].grad, 1e-5)
    lk.merge(ours)
    wrapped.merge()
    close(layer.weight, wrapped.base_layer.weight, 1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_r": 0}, "init_r=0"),
        ({"target_r": 1.5}, "target_r=1.5"),
        ({"init_r": 4, "target_r": 5}, "cannot start below"),
        ({"alpha": 0}, "alpha = init_r"),
        ({"tinit": -1}, "tinit counts steps"),
        ({"deltaT": 0}, "deltaT counts steps, at least 1"),
        ({"beta1": 1.0}, "beta1 lies between"),
        ({"beta2": 0.0}, "beta2 lies between"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight"),
        ({"orth_reg": "sum"}, "'norm' or 'squared'"),
        ({"dropout": 1.0}, "dropout"),
        ({"kept_r": 13}, "between 0 and init_r=12"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lk.AdaLoRA(**settings)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="init_r=5 is more than a 4 x 4"):
        lk.attach(Host(nn.Linear(4, 4)), lk.AdaLoRA(init_r=5, target_r=1), ["layer"])
    with pytest.raises(UnsupportedTargetError, match="no input to drop"):
        lk.attach(nn.MultiheadAttention(4, 2), lk.AdaLoRA(init_r=2, target_r=1, dropout=0.1), ["out_proj"])


def test_dropout_acts_in_training() -> None:
    case = Case("linear")
    method = lk.AdaLoRA(init_r=2, target_r=1, dropout=0.5)
    lk.attach(case.model, method, ["layer"], name="a")
    randomise(case.parameters("a").values(), case.draw)
    assert not torch.equal(case.model(case.x), case.model(case.x))
    case.model.eval()
    assert torch.equal(case.model(case.x), case.model(case.x))


def test_singular_values_are_a_group_of_their_own_in_lora_plus() -> None:
    case = Case("linear")
    case.attach("adalora")
    fast = lk.parameter_groups(case.model, lr=1e-3, lora_plus_ratio=4, fast=("singular values",))
    assert [id(p) for p in fast[-1]["params"]] == [id(case.parameters("a")["lora_E"])]
    assert fast[-1]["lr"] == pytest.approx(4e-3)


def test_two_settings_are_equal_as_keys() -> None:
    one = lk.AdaLoRA(init_r=4, target_r=2)
    assert {one: 1}[dataclasses.replace(one, kept_r=None)] == 1


def test_padding_of_an_embedding_starts_and_stays_at_zero() -> None:
    case = Case("embedding-padding")
    case.attach("adalora", random=False)
    A: Tensor = case.parameters("a")["lora_A"]
    assert torch.equal(A[:, 2], torch.zeros(2, dtype=A.dtype))
    assert A.abs().sum() > 0
