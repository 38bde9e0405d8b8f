"""InputDoRA: norms along the inputs, LyCORIS's numbers, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core import Shape
from lorakit.errors import ConfigError, UnsupportedTargetError


def lycoris(W: torch.Tensor, delta: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``apply_weight_decompose`` with ``wd_on_output=False``, without its epsilon; ``scale`` is ``(1, in, 1, ...)``."""
    weight = W + delta
    norm = weight.transpose(0, 1).reshape(weight.shape[1], -1).norm(dim=1, keepdim=True)
    return weight * (scale / norm.reshape(weight.shape[1], *[1] * (weight.dim() - 1)).transpose(0, 1))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 4), torch.randn(3, 6)),
        (nn.Conv2d(6, 4, 3, bias=False), torch.randn(2, 6, 5, 5)),
    ],
    ids=["linear", "conv2d"],
)
def test_it_computes_what_lycoris_does(layer: nn.Module, x: torch.Tensor) -> None:
    model, x = nn.Sequential(layer).double(), x.double()
    base = model[0].weight.detach().clone()
    lk.attach(model, lk.InputDoRA(lk.LoRA(r=2, alpha=3)), targets=["0"], seed=0)
    p = {name.rsplit(".", 1)[-1]: value for name, value in lk.trainable(model).items()}
    with torch.no_grad():
        for value in p.values():
            value.add_(torch.randn_like(value) * 0.3)
    delta = (1.5 * p["lora_B"] @ p["lora_A"]).reshape(base.shape)
    scale = p["magnitude"].reshape(1, 6, *[1] * (base.dim() - 2))
    want = lycoris(base, delta, scale).detach()
    y = model(x).detach()
    lk.merge(model)
    torch.testing.assert_close(model[0].weight.detach(), want)
    torch.testing.assert_close(model(x).detach(), y)
    lk.unmerge(model)
    assert torch.equal(model[0].weight, base)


def test_the_columns_of_the_new_weight_have_the_lengths_of_the_magnitude() -> None:
    model = nn.Sequential(nn.Linear(5, 7)).double()
    lk.attach(model, lk.InputDoRA(lk.LoKr(r=1)), targets=["0"], seed=0)
    p = {name.rsplit(".", 1)[-1]: value for name, value in lk.trainable(model).items()}
    torch.testing.assert_close(p["magnitude"].detach(), model[0].weight.norm(dim=0).detach())
    with torch.no_grad():
        for value in p.values():
            value.add_(torch.rand_like(value))
    lk.merge(model)
    torch.testing.assert_close(model[0].weight.norm(dim=0), p["magnitude"])


def test_counts() -> None:
    method = lk.InputDoRA(lk.LoRA(r=2))
    assert method.shapes(Shape("linear", out=4, in_=6))["magnitude"] == (6,)
    assert method.shapes(Shape("conv", out=4, in_=54, kernel=(3, 3)))["magnitude"] == (6,)
    assert method.shapes(Shape("conv", out=2, in_=27, batch=(2,), kernel=(3, 3)))["magnitude"] == (2, 3)


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="InputDoRA wraps a method that adds a change"):
        lk.InputDoRA(lk.IA3())  # type: ignore[arg-type]
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    with pytest.raises(UnsupportedTargetError, match="its input is an index"):
        lk.attach(model, lk.InputDoRA(), targets=["0"])
    with pytest.raises(UnsupportedTargetError, match="dropout=0"):
        lk.attach(model, lk.InputDoRA(lk.LoRA(r=2, dropout=0.1)), targets=["1"])
    with pytest.raises(UnsupportedTargetError, match="bias=False"):
        lk.attach(model, lk.InputDoRA(lk.LoRA(r=2, bias=True)), targets=["1"])


def test_saved_in_our_own_form(tmp_path: object) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    lk.attach(model, lk.InputDoRA(lk.LoRA(r=2)), targets=["0"], seed=0)
    lk.save(model, tmp_path)  # type: ignore[arg-type]
    state = lk.read(tmp_path)  # type: ignore[arg-type]
    assert state.spec.methods == {"0": lk.InputDoRA(lk.LoRA(r=2))}
