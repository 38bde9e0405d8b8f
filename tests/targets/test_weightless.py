"""A target that is no weight refuses whatever would need one; see also ``test_attention.py``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.core.target import Shape
from lorakit.errors import UnsupportedTargetError
from lorakit.targets.dense import DenseStorage
from lorakit.targets.weightless import WeightlessTarget


def test_it_has_a_device_and_a_dtype_and_no_weight() -> None:
    block = nn.Sequential(nn.Linear(2, 3, dtype=torch.float64))
    target = WeightlessTarget("block", block, "block", DenseStorage())
    target.shape = Shape("module", out=3, in_=2)
    assert target.stored.dtype is torch.float64
    assert target.bias is None
    with pytest.raises(UnsupportedTargetError, match="'block' is a Sequential that is adapted as a whole"):
        target.weight()
    with pytest.raises(UnsupportedTargetError, match="not one weight"):
        target.add_low_rank(torch.ones(1, 3), torch.ones(1, 2), torch.ones(1, 2), torch.ones(3, 1), 1.0, 0.0)
