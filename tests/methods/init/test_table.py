"""The table of starts says the truth about each of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core import Shape
from lorakit.errors import ConfigError
from lorakit.methods.init import INITS, init_called
from lorakit.targets import find
from tests.contracts.kinds import Host

FROM_THE_WEIGHT = [name for name, init in INITS.items() if not init.needs]


@pytest.mark.parametrize("name", [*FROM_THE_WEIGHT, "pissa_niter_3"])
def test_a_start_is_subtracted_exactly_if_its_product_is_not_zero(name: str) -> None:
    model = Host(nn.Linear(8, 6))
    before = model(x := torch.randn(4, 8))
    (target,) = find(model, ["layer"])
    method = lk.LoRA(r=2, init=name)
    p = method.start(target, None, {})
    product = p["lora_B"] @ p["lora_A"]
    assert method.subtracted is bool(product.abs().max() > 1e-6)
    assert method.frozen == ({"start_A", "start_B"} if method.subtracted else set())
    lk.attach(model, method, ["layer"])
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in INITS if name not in FROM_THE_WEIGHT])
def test_what_needs_data_names_the_function_to_call(name: str) -> None:
    model = Host(nn.Linear(8, 6))
    for method in (lk.LoRA(r=2, init=name), lk.DoRA(lk.LoRA(r=2, init=name))):
        with pytest.raises(
            ConfigError, match=rf"alone: {INITS[name].needs.split('(')[0]}.* makes it.*trainable=True"
        ):
            lk.attach(model, method, ["layer"])
    assert not any("lorakit" in n for n, _ in model.named_modules()), "nothing was touched"


@pytest.mark.parametrize("name", [*INITS, "pissa_niter_16"])
def test_sizes_are_known_without_data_or_weights(name: str) -> None:
    sizes = lk.LoRA(r=2, init=name).shapes(Shape("linear", out=6, in_=8))
    assert sizes["lora_A"] == (2, 8)
    assert sizes["lora_B"] == (6, 2)
    assert sizes.keys() - {"lora_A", "lora_B"} == lk.LoRA(r=2, init=name).frozen
    assert init_called(name).subtracted == ("start_A" in sizes)


@pytest.mark.parametrize("name", ["pissa", "olora", "orthogonal", "kaiming"])
def test_padding_has_no_part_in_the_start(name: str) -> None:
    """A row that no token reads must not be moved by training: its column of ``A`` is and stays zero."""
    model = Host(nn.Embedding(9, 6, padding_idx=4))
    with torch.no_grad():
        model.layer.weight[4] = 1.0  # as some pretrained models have it
    lk.attach(model, lk.LoRA(r=2, init=name), ["layer"])
    p = dict(model.named_parameters())
    A = p["layer.lorakit.output.default.lora_A"]
    assert (A[:, 4] == 0).all()
    assert model(torch.tensor([4])).equal(torch.ones(1, 6))
    model(torch.tensor([[4, 1]])).square().sum().backward()
    with torch.no_grad():
        for q in lk.trainable(model).values():
            q.sub_(0.1 * q.grad)  # type: ignore[operator]
    assert model(torch.tensor([4])).equal(torch.ones(1, 6))
    assert not model(torch.tensor([1])).equal(model.layer.weight[1:2])


def test_an_unknown_name() -> None:
    with pytest.raises(
        ConfigError, match=r"No init is called 'ortogonal'. Did you mean 'orthogonal'.*pissa_niter_N"
    ):
        init_called("ortogonal")
    with pytest.raises(ConfigError, match="No init is called 3"):
        lk.LoRA(init=3)  # type: ignore[arg-type]
