"""The worked example in CONTRIBUTING.md is a working method."""

from __future__ import annotations

import copy
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


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("contributing_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    known = dict(METHODS)
    exec(EXAMPLE, module.__dict__)
    yield module.__dict__["OneDirection"](scale=2.0)
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
    base, changed = layer(x), copy.deepcopy(layer)
    lk.attach(model, method, targets=["layer"])
    assert torch.equal(layer(x), base)
    (g,) = lk.trainable(model).values()
    with torch.no_grad():
        g.fill_(0.7)
    parts = {name.rsplit(".", 1)[-1]: p for name, p in model.named_parameters() if ".lorakit." in name}
    delta = 2.0 * 0.7 * parts["u"] @ parts["v"]
    changed.weight.data += delta.detach().reshape(layer.weight.shape)  # type: ignore[operator, union-attr]
    adapted = layer(x)
    torch.testing.assert_close(adapted, changed(x))
    lk.merge(model)
    torch.testing.assert_close(layer(x), adapted)
    lk.unmerge(model)
    lk.detach(model)
    assert torch.equal(layer(x), base)
