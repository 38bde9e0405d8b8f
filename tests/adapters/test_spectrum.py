"""Singular values from the factors equal those of the dense change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters import spectrum


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
    from lorakit.adapters import Spectrum

    assert Spectrum(torch.tensor([2.0, 2.0, 2.0])).effective_rank == pytest.approx(3)
    assert Spectrum(torch.tensor([2.0, 0.0, 0.0])).effective_rank == pytest.approx(1)


def test_a_method_without_factors_has_none() -> None:
    adapter = state(nn.Linear(3, 3), lk.FullFineTuning(), ["0"])
    assert spectrum(adapter, next(iter(adapter.tensors))) is None


def test_a_change_that_is_not_finite_has_none() -> None:
    adapter = state(nn.Linear(5, 5), lk.LoRA(r=2))
    adapter.tensors["0"]["lora_A"][0, 0] = float("inf")
    assert spectrum(adapter, "0") is None
