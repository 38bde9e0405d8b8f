"""Convolutions of every geometry, as groups of matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.targets import ConvTarget, find
from tests.contracts.kinds import Host
from tests.contracts.pairs import close

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "valid": {"padding": "valid"},
    "same": {"padding": "same", "dilation": 2},
    "zeros-dilated": {"padding": 2, "dilation": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": 2, "padding_mode": "circular"},
    "same-circular": {"padding": "same", "padding_mode": "circular"},
    "groups": {"groups": 2, "bias": False},
    "depthwise": {"groups": 4},
}


@pytest.mark.parametrize("unbatched", [False, True], ids=["batch", "single"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry(geometry: str, dims: int, unbatched: bool) -> None:
    options = GEOMETRIES[geometry]
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 8, 3, **options).double()
    (target,) = find(Host(conv), ["layer"])
    assert isinstance(target, ConvTarget)
    groups = options.get("groups", 1)
    assert (target.batch, target.out, target.in_) == (
        (groups,) if groups > 1 else (),
        8 // groups,
        4 // groups * 3**dims,
    )
    x = torch.randn(*(() if unbatched else (2,)), 4, *(6,) * dims, dtype=torch.float64)
    y = conv(x).detach()
    close(target.add_bias(target.apply(x, target.weight())), y, 1e-13)
    A = torch.randn(*target.batch, 2, target.in_, dtype=torch.float64)
    B = torch.randn(*target.batch, target.out, 2, dtype=torch.float64)
    expected = y + 0.5 * target.apply(x, B @ A)
    close(target.add_low_rank(y.clone(), x, A, B, 0.5, 0.0), expected, 1e-12)


def test_output_in_channels_last_memory() -> None:
    torch.manual_seed(0)
    model = Host(nn.Conv2d(3, 4, 3, padding=1)).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    lk.attach(model, lk.LoRA(r=2), ["layer"], name="a", dtype=torch.float64)
    _randomise(model)
    plain = model(x)
    last = model(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    close(last, plain, 1e-13)


@pytest.mark.parametrize(
    "method", [lk.LoRA(r=1), lk.LoRA(r=1, bias=True), lk.DoRA(lk.LoRA(r=1))], ids=["lora", "bias", "dora"]
)
def test_an_empty_batch(method: lk.LoRA) -> None:
    model = Host(nn.Conv2d(4, 6, 3, groups=2, padding=1))
    lk.attach(model, method, ["layer"])
    x = torch.randn(0, 4, 5, 5)
    y = model(x)
    assert y.shape == (0, 6, 5, 5)
    y.sum().backward()
    with torch.no_grad():
        assert model(x).shape == (0, 6, 5, 5)


def test_each_example_equals_its_own_run() -> None:
    torch.manual_seed(0)
    model = Host(nn.Conv2d(4, 6, 3, groups=2)).double()
    lk.attach(model, lk.LoRA(r=2), ["layer"], dtype=torch.float64)
    _randomise(model)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    close(model(x), torch.stack([model(one) for one in x]), 1e-13)


def test_a_bias_and_a_scale_act_on_channels() -> None:
    (target,) = find(Host(nn.Conv2d(4, 6, 3, groups=2)), ["layer"])
    y = torch.ones(2, 6, 3, 3)
    k = torch.arange(6.0)
    assert torch.equal(target.scale_out(y, k.view(2, 3))[0, :, 0, 0], k)
    assert torch.equal(target.scale_add_bias(y, k, 2.0)[1, :, 2, 2], 1 + 2 * k)


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lorakit" in name:
                p.normal_()


def test_a_kronecker_product_of_groups() -> None:
    conv = nn.Conv2d(4, 8, 3, groups=2, padding=1).double()
    (target,) = find(Host(conv), ["layer"])
    W1, W2 = torch.randn(2, 2, 1, dtype=torch.float64), torch.randn(2, 2, 18, dtype=torch.float64)
    kernel = torch.cat([torch.kron(one, other) for one, other in zip(W1, W2, strict=True)]).reshape(
        8, 2, 3, 3
    )
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    close(target.apply_kronecker(x, W1, W2), conv._conv_forward(x, kernel, None), 1e-13)
