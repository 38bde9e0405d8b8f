"""Cosine, distance and orthogonal parts equal those of the dense changes."""

from __future__ import annotations

import pytest
import torch

import lorakit as lk
from lorakit.adapters import combine, compare, negated, orthogonalised, resize
from lorakit.core import Shape
from lorakit.errors import ConfigError
from tests.adapters.states import change, linear, loras, random_state


def test_equals_the_dense_figures() -> None:
    a, b, _ = loras()
    found = compare(a, b).targets["q"]
    x, y = change(a), change(b)
    assert found.norm_a == pytest.approx(x.norm().item(), rel=1e-13)
    assert found.inner == pytest.approx((x * y).sum().item(), rel=1e-12)
    assert found.distance == pytest.approx((x - y).norm().item(), rel=1e-13)
    assert found.cosine == pytest.approx(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0).item())


def test_the_same_change_in_other_words() -> None:
    a = loras()[0]
    other = resize(a, 5).state
    assert compare(a, other).whole.cosine == pytest.approx(1, abs=1e-14)
    assert compare(a, other).whole.distance < 1e-13 * change(a).norm()
    assert compare(a, negated(a)).whole.cosine == pytest.approx(-1, abs=1e-14)


def test_a_small_distance_keeps_its_digits() -> None:
    a, b, _ = loras()
    near = combine([a, b], [1.0, 1e-12]).state
    assert compare(a, near).whole.distance == pytest.approx(1e-12 * change(b).norm().item(), rel=0.02)


def test_targets_of_one_alone_count_as_zero_in_the_other() -> None:
    shapes = {"q": linear(), "k": linear(4, 5)}
    a = random_state(dict.fromkeys(("q", "k"), lk.LoRA(r=2)), shapes, seed=1)
    b = random_state({"q": lk.LoRA(r=3)}, {"q": linear()}, seed=2)
    found = compare(a, b)
    assert (found.only_a, found.only_b) == (("k",), ())
    assert found.targets["k"].cosine is None
    assert found.targets["k"].distance == pytest.approx(change(a, "k").norm().item())
    x = torch.cat([change(a, "q").flatten(), change(a, "k").flatten()])
    y = torch.cat([change(b, "q").flatten(), torch.zeros(20)])
    assert found.whole.distance == pytest.approx((x - y).norm().item())
    assert found.whole.cosine == pytest.approx(torch.cosine_similarity(x, y, dim=0).item())


def test_dense_methods_when_asked() -> None:
    a = random_state({"q": lk.LoHa(r=2)}, {"q": linear()})
    b = loras()[1]
    with pytest.raises(ConfigError, match="dense=True"):
        compare(a, b)
    assert compare(a, b, dense=True).whole.distance == pytest.approx((change(a) - change(b)).norm().item())


@pytest.mark.parametrize("batch", [(), (3,)])
def test_orthogonal_parts(batch: tuple[int, ...]) -> None:
    shape = {"q": Shape("parameter", out=9, in_=7, batch=batch, stored=(*batch, 9, 7))}
    a = random_state({"q": lk.LoRA(r=3, alpha=6)}, shape, seed=1)
    b = random_state({"q": lk.LoRA(r=2, alpha=5, scaling="rslora")}, shape, seed=2)
    x, y = change(a), change(b)
    direction = change(orthogonalised(a, b))
    torch.testing.assert_close(direction, x - (x * y).sum() / y.square().sum() * y)
    assert abs(float((direction * y).sum())) < 1e-10
    inputs = orthogonalised(a, b, "inputs")
    assert (change(inputs) @ y.mT).norm() < 1e-10
    assert inputs.spec.methods["q"].r == 3  # type: ignore[attr-defined]
    outputs = orthogonalised(a, b, "outputs")
    assert (change(outputs).mT @ y).norm() < 1e-10
    V = torch.linalg.svd(y).Vh[..., :2, :]
    torch.testing.assert_close(change(inputs), x - x @ V.mT @ V)


def test_nothing_in_common_stays_as_it_is() -> None:
    a, b, _ = loras()
    b.tensors["q"]["lora_B"].zero_()
    for how in ("direction", "inputs", "outputs"):
        torch.testing.assert_close(change(orthogonalised(a, b, how)), change(a))
    with pytest.raises(ConfigError, match="how is 'direction'"):
        orthogonalised(a, b, "rows")
