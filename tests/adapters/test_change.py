"""Reading what an adapter changes at a target."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters.change import dense_change, low_rank_change, parameter_shape, require_finite
from lorakit.core import Shape
from lorakit.errors import ConfigError
from tests.adapters.states import extracted, linear, random_state


def test_factors_and_the_dense_change_agree_and_are_double() -> None:
    state = random_state({"q": lk.LoRA(r=2, alpha=5, init="pissa")}, {"q": linear()}, dtype=torch.float32)
    A, B, scale = low_rank_change(state, "q")
    dense = dense_change(state, "q")
    assert dense.dtype == A.dtype == torch.float64
    torch.testing.assert_close(scale * B @ A, dense)
    p = {name: t.double() for name, t in state.tensors["q"].items()}
    torch.testing.assert_close(dense, 2.5 * (p["lora_B"] @ p["lora_A"] - p["start_B"] @ p["start_A"]))


@pytest.mark.parametrize(
    "method", [lk.DoRA(lk.LoRA(r=2)), lk.DoRA(lk.LoHa(r=2)), lk.IA3(), lk.FullFineTuning()]
)
def test_with_its_base_every_weight_method_tells_its_change(method: lk.DoRA) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6)).double()
    full = isinstance(method, lk.FullFineTuning)
    state = extracted(model, method, targets=["0.weight"] if full else ["0"])
    (path,) = state.tensors
    W = model[0].weight.detach().clone()
    with pytest.raises(ConfigError, match=r"depends on the base weight. Give it"):
        dense_change(state, path)
    with pytest.raises(ConfigError, match=r"should have the size \(6, 5\); it has \(2, 2\)"):
        dense_change(state, path, {path: torch.zeros(2, 2)})
    found = dense_change(state, path, {path: W})
    lk.attach(model, state, name="a")
    lk.merge(model)
    torch.testing.assert_close(found, model[0].weight.detach() - W)


def test_methods_that_add_nothing_to_a_weight_are_refused() -> None:
    houlsby = random_state({"q": lk.Houlsby(size=2)}, {"q": linear(7, 7)})
    with pytest.raises(ConfigError, match="changes no weight"):
        dense_change(houlsby, "q")
    with pytest.raises(ConfigError, match="is no addition to a weight"):
        low_rank_change(houlsby, "q")


def test_a_tensor_that_is_not_finite_is_named() -> None:
    state = random_state({"q": lk.LoRA(r=2)}, {"q": linear()})
    require_finite(state, "It")
    state.tensors["q"]["lora_B"][1, 1] = float("-inf")
    with pytest.raises(ConfigError, match="It holds a NaN or an infinity in q:lora_B:"):
        require_finite(state, "It")


def test_parameters_are_seen_as_attach_sees_them() -> None:
    assert parameter_shape((4,)) == Shape("parameter", out=4, in_=1, stored=(4,))
    assert parameter_shape(()) == Shape("parameter", out=1, in_=1, stored=())
    assert parameter_shape((2, 3, 4)) == Shape("parameter", out=3, in_=4, batch=(2,), stored=(2, 3, 4))
