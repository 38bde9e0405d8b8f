"""Uniform starts: torch's own bounds, the same bits as other libraries' where the generator is the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lorakit.methods.init.uniform import fan_in_uniform


@pytest.mark.parametrize("size", [(7, 5), (3, 4, 2, 2), (4, 6, 3)], ids=str)
@pytest.mark.parametrize(("a", "gain"), [(math.sqrt(5), 1 / math.sqrt(3)), (0.0, math.sqrt(2))])
def test_it_is_torchs_kaiming_uniform(size: tuple[int, ...], a: float, gain: float) -> None:
    draw = torch.Generator().manual_seed(3)
    want = nn.init.kaiming_uniform_(torch.empty(size), a=a, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(fan_in_uniform(size, draw, gain=gain), want, rtol=1e-6, atol=0)


def test_a_stack_does_not_change_the_fan_in() -> None:
    draw = torch.Generator().manual_seed(0)
    values = fan_in_uniform((50, 20, 16), draw, stack=1)
    assert 0.99 / 4 < float(values.abs().max()) <= 1 / 4
    assert torch.equal(fan_in_uniform((2, 16), None), fan_in_uniform((2, 16), None)) is False


def test_the_default_dtype_does_not_change_the_numbers() -> None:
    want = fan_in_uniform((3, 4), torch.Generator().manual_seed(1))
    torch.set_default_dtype(torch.float64)
    try:
        got = fan_in_uniform((3, 4), torch.Generator().manual_seed(1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype is torch.float32
    assert torch.equal(got, want)
