"""The worked example in CONTRIBUTING.md is a working method, slow and fast form alike."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core import METHODS

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S
)
EXAMPLE = next(block for block in BLOCKS if "@register" in block)
FORWARD = next(block for block in BLOCKS if block.startswith("    def forward"))


@pytest.fixture(params=[EXAMPLE, EXAMPLE + "\n" + FORWARD], ids=["derived", "override"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("contributing_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    known = dict(METHODS)
    exec(request.param, module.__dict__)
    yield module.__dict__["OutputGain"]()
    METHODS.clear()
    METHODS.update(known)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 4), torch.randn(3, 6)),
        (nn.Conv2d(3, 4, 3, padding=1, dilation=2), torch.randn(2, 3, 7, 7)),
    ],
    ids=["linear", "conv2d"],
)
def test_it_attaches_trains_merges_and_detaches(method: Any, layer: nn.Module, x: torch.Tensor) -> None:
    model = nn.ModuleDict({"layer": layer})
    base = layer(x)
    lk.attach(model, method, targets=["layer"])
    torch.testing.assert_close(layer(x), base)
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.uniform_(0.5, 2)
    k = next(iter(lk.trainable(model).values())).detach()
    bias = layer.bias.detach().reshape(-1, *(1,) * (x.dim() - 2))  # type: ignore[union-attr, operator]
    adapted = layer(x)
    torch.testing.assert_close(adapted, (base - bias) * k.reshape(bias.shape) + bias)
    lk.merge(model)
    torch.testing.assert_close(layer(x), adapted)
    lk.unmerge(model)
    lk.detach(model)
    assert torch.equal(layer(x), base)
