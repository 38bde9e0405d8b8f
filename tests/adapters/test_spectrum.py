"""Singular values from the factors equal those of the dense change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lorakit as lk
from lorakit.adapters import Spectrum, spectrum
from lorakit.adapters.change import dense_change
from tests.adapters.states import change, linear, random_state


def state(layer: nn.Module, method: object, targets: object = "all-linear") -> lk.AdapterState:
    model = nn.Sequential(layer)
    lk.attach(model, method, targets=targets, seed=0)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    return lk.extract(model)


@pytest.mark.parametrize("wrap", [lambda m: m, lk.DoRA])
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_equals_the_dense_change(wrap: object, scaling: str) -> None:
    adapter = state(nn.Linear(12, 9), wrap(lk.LoRA(r=4, alpha=6, scaling=scaling)))  # type: ignore[operator]
    found = spectrum(adapter, "0")
    assert found is not None
    group = adapter.tensors["0"]
    scale = 6 / 4 if scaling == "lora" else 6 / 2
    dense = scale * group["lora_B"].double() @ group["lora_A"].double()
    values = torch.linalg.svdvals(dense)
    assert torch.allclose(found.values, values[:4])
    assert found.top == pytest.approx(torch.linalg.matrix_norm(dense, 2).item())
    assert found.frobenius == pytest.approx(dense.norm().item())
    shares = values[:4] / values[:4].sum()
    assert found.effective_rank == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item())


def test_stack_of_matrices() -> None:
    adapter = state(nn.Conv2d(4, 6, 3, groups=2), lk.LoRA(r=2), ["0"])
    found = spectrum(adapter, "0")
    assert found is not None
    assert found.values.shape == (2, 2)
    group = adapter.tensors["0"]
    assert found.frobenius == pytest.approx(
        (8 * group["lora_B"].double() @ group["lora_A"].double()).norm().item()
    )


def test_fresh_adapter_has_no_change() -> None:
    model = nn.Sequential(nn.Linear(5, 5))
    lk.attach(model, lk.LoRA(r=2))
    found = spectrum(lk.extract(model), "0")
    assert found is not None
    assert (found.top, found.frobenius, found.effective_rank) == (0.0, 0.0, 0.0)


def test_effective_rank_counts_equal_directions() -> None:
    assert Spectrum(torch.tensor([2.0, 2.0, 2.0])).effective_rank == pytest.approx(3)
    assert Spectrum(torch.tensor([2.0, 0.0, 0.0])).effective_rank == pytest.approx(1)


def test_a_method_without_factors_has_none() -> None:
    adapter = state(nn.Linear(3, 3), lk.FullFineTuning(), ["0"])
    assert spectrum(adapter, next(iter(adapter.tensors))) is None


def test_a_change_that_is_not_finite_has_none() -> None:
    adapter = state(nn.Linear(5, 5), lk.LoRA(r=2))
    adapter.tensors["0"]["lora_A"][0, 0] = float("inf")
    assert spectrum(adapter, "0") is None


def test_equal_singular_values_have_all_ranks_equal() -> None:
    for k in (1, 3, 7):
        values = torch.cat([torch.full((k,), 2.5), torch.zeros(2)]).double()
        found = Spectrum(values)
        assert found.stable_rank == pytest.approx(k)
        assert found.effective_rank == pytest.approx(k)
        assert found.energy_rank(1.0) == k
        assert found.energy[k - 1 :].tolist() == pytest.approx([1] * 3)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=12))
def test_stable_is_at_most_effective_is_at_most_rank(values: list[float]) -> None:
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    S = S * (S > 1e-100)  # the square of less is zero
    found = Spectrum(S)
    assert found.stable_rank <= found.effective_rank + 1e-9
    assert found.effective_rank <= int((S > 0).sum()) + 1e-9
    assert (found.energy.diff() >= 0).all()
    assert float(found.energy[-1]) == pytest.approx(1 if S[0] else 0)


def test_energy() -> None:
    found = Spectrum(torch.tensor([3.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    assert found.energy.tolist() == pytest.approx([9 / 12, 10 / 12, 11 / 12, 1])
    assert [found.energy_rank(share) for share in (0.5, 0.75, 0.76, 0.9, 1)] == [1, 1, 2, 3, 4]
    assert found.stable_rank == pytest.approx(12 / 9)
    with pytest.raises(lk.LorakitError, match="share of the squared norm"):
        found.energy_rank(0)


def test_stable_rank_of_a_stack_is_the_mean() -> None:
    stack = Spectrum(torch.tensor([[2.0, 2.0], [3.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert stack.stable_rank == pytest.approx((2 + 1 + 0) / 3)
    assert stack.energy.tolist() == pytest.approx([13 / 17, 1])


def test_dense_changes_of_methods_without_factors() -> None:
    adapter = random_state({"q": lk.LoHa(r=2, alpha=1)}, {"q": linear()})
    assert spectrum(adapter, "q") is None
    found = spectrum(adapter, "q", dense=True)
    assert found is not None
    assert torch.allclose(found.values, torch.linalg.svdvals(change(adapter)))


def test_dora_with_its_base_counts_with_its_magnitude() -> None:
    adapter = random_state({"q": lk.DoRA(lk.LoRA(r=2))}, {"q": linear()})
    W = torch.randn(9, 7, dtype=torch.float64)
    direction, true = spectrum(adapter, "q"), spectrum(adapter, "q", base={"q": W})
    assert direction is not None
    assert true is not None
    assert len(direction.values) == 2
    assert torch.allclose(true.values, torch.linalg.svdvals(dense_change(adapter, "q", {"q": W})))
    assert true.frobenius != pytest.approx(direction.frobenius)
    plain = random_state({"q": lk.LoRA(r=2)}, {"q": linear()})
    assert len(spectrum(plain, "q", base={"q": W}).values) == 2  # type: ignore[union-attr]
