"""Resizing: the best approximation at a rank, an energy, a size."""

from __future__ import annotations

import pytest
import torch

import lorakit as lk
from lorakit.adapters import energy_rank, resize
from lorakit.core import Shape
from lorakit.errors import ConfigError
from tests.adapters.states import change, linear, loras, random_state


def state() -> lk.AdapterState:
    shapes = {
        "q": linear(9, 7),
        "k": linear(6, 12),
        "c": Shape("conv", out=3, in_=8, batch=(2,), kernel=(2, 2)),
    }
    methods = {"q": lk.LoRA(r=5, alpha=3), "k": lk.LoRA(r=4, alpha=8, scaling="rslora"), "c": lk.LoRA(r=3)}
    return random_state(methods, shapes)


def rank(found: lk.AdapterState, path: str) -> int:
    method = found.spec.methods[path]
    assert isinstance(method, lk.LoRA)
    return method.r


@pytest.mark.parametrize("r", [1, 2, 3])
def test_a_smaller_rank_is_the_truncated_svd(r: int) -> None:
    made = resize(state(), r)
    for path in state().tensors:
        dense = change(state(), path)
        tail = torch.linalg.svdvals(dense)[..., r:].norm().item()
        assert (change(made.state, path) - dense).norm().item() == pytest.approx(tail, abs=1e-12)
        assert made.residuals[path].lost == pytest.approx(tail, abs=1e-12)
        assert made.residuals[path].norm == pytest.approx(dense.norm().item())
        assert rank(made.state, path) == r


def test_a_larger_rank_keeps_the_change() -> None:
    made = resize(state(), 6).state
    for path in state().tensors:
        torch.testing.assert_close(change(made, path), change(state(), path))
        assert rank(made, path) == 6


def test_equal_singular_values_and_the_rank_of_an_energy() -> None:
    assert [energy_rank(torch.ones(4), e) for e in (0.25, 0.26, 0.5, 0.99, 1.0)] == [1, 2, 2, 4, 4]
    assert energy_rank(torch.zeros(4), 0.9) == 1
    assert energy_rank(torch.tensor([3.0, 4.0, 0.0]).sort(descending=True).values, 1.0) == 2


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_energy_is_held_at_every_target(energy: float) -> None:
    made = resize(state(), energy=energy)
    for path in state().tensors:
        squares = (
            torch.linalg.svdvals(change(state(), path))
            .square()
            .reshape(-1, min(change(state(), path).shape[-2:]))
        )
        shares = squares.sum(0).cumsum(0) / squares.sum()
        kept = rank(made.state, path)
        assert shares[kept - 1] >= energy - 1e-12
        assert kept == 1 or shares[kept - 2] < energy
    assert max(rank(resize(state(), 2, energy=0.9).state, path) for path in state().tensors) == 2


def test_a_size_keeps_what_holds_the_most_for_its_bytes() -> None:
    full = state().nbytes
    before = float("inf")
    for most in (700, 900, 1200, full):
        made = resize(state(), max_bytes=most)
        assert made.state.nbytes <= most
        assert made.error <= before
        before = made.error
    assert before < 1e-14
    with pytest.raises(ConfigError, match="take 448"):
        resize(state(), max_bytes=100)
    assert resize(state(), max_bytes=448).state.nbytes == 448
    half = resize(state(), max_bytes=full // 2, dtype=torch.float32).state
    assert all(t.dtype == torch.float32 for _, _, t in half.all_tensors())
    assert half.nbytes <= full // 2


def test_two_targets_by_hand() -> None:
    """Equal sizes and two directions each: with room for three the largest three stay."""
    shapes = {"a": linear(4, 4), "b": linear(4, 4)}
    made = random_state({"a": lk.LoRA(r=2, alpha=2), "b": lk.LoRA(r=2, alpha=2)}, shapes)
    for path, values in (("a", (5.0, 4.0)), ("b", (3.0, 1.0))):
        made.tensors[path]["lora_A"].copy_(torch.eye(4)[:2])
        made.tensors[path]["lora_B"].copy_(torch.eye(4)[:, :2] * torch.tensor(values))
    found = resize(made, max_bytes=3 * 8 * 8)
    assert (rank(found.state, "a"), rank(found.state, "b")) == (2, 1)
    assert found.error == pytest.approx(1 / 51**0.5)


def test_dora_keeps_its_magnitude_and_other_targets_stay() -> None:
    shapes = {"q": linear(), "head.weight": Shape("parameter", out=2, in_=3, stored=(2, 3))}
    made = random_state({"q": lk.DoRA(lk.LoRA(r=4, alpha=2)), "head.weight": lk.FullFineTuning()}, shapes)
    found = resize(made, 2).state
    assert found.spec.methods["q"] == lk.DoRA(lk.LoRA(r=2, alpha=2))
    assert torch.equal(found.tensors["q"]["magnitude"], made.tensors["q"]["magnitude"])
    assert found.tensors["head.weight"] is made.tensors["head.weight"]


def test_shared_projections_are_left_behind() -> None:
    vera = random_state({"q": lk.VeRA(r=6, max_in=7, max_out=9)}, {"q": linear()})
    found = resize(vera, 6).state
    assert not found.shared
    torch.testing.assert_close(change(found), change(vera))


def test_dense_methods_when_asked() -> None:
    loha = random_state({"q": lk.LoHa(r=2, alpha=3)}, {"q": linear()})
    with pytest.raises(
        ConfigError, match=r"No target of this adapter has a rank \(it uses loha\).*dense=True"
    ):
        resize(loha, 4)
    made = resize(loha, 4, dense=True)
    torch.testing.assert_close(change(made.state), change(loha))


def test_mistakes() -> None:
    for settings in ({}, {"r": 1, "max_bytes": 10}):
        with pytest.raises(ConfigError, match="r or energy or both, or else max_bytes"):
            resize(state(), **settings)  # type: ignore[arg-type]
    broken = loras()[0]
    broken.tensors["q"]["lora_A"][0, 0] = float("inf")
    with pytest.raises(ConfigError, match="q:lora_A"):
        resize(broken, 1)
