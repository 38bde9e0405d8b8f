"""BitFit: biases and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import UnmatchedTargetError, UnsupportedTargetError


def test_every_bias_and_nothing_else_is_trained() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    report = lk.attach(layer, lk.BitFit())
    assert {site.path for site in report.sites} == {
        n for n, _ in layer.named_parameters() if n.endswith("bias") and "lorakit" not in n
    }
    assert report.parameters == 11 * 16, (
        "the 11 d of the docstring: 3 + 1 in attention, 4 + 1 in the MLP, 2 in the norms"
    )
    x = torch.randn(2, 3, 16)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in lk.trainable(layer).values())


def test_a_model_without_biases() -> None:
    with pytest.raises(UnmatchedTargetError, match="all-bias"):
        lk.attach(nn.Linear(3, 3, bias=False), lk.BitFit())


def test_other_parameters_are_refused() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(UnsupportedTargetError, match=r"biases only.*FullFineTuning"):
        lk.attach(model, lk.BitFit(), ["weight"])
    assert not hasattr(model, "lorakit")
