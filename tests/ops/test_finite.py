"""One pass finds every NaN and infinity, in every dtype and layout."""

from __future__ import annotations

import pytest
import torch

from lorakit.ops import all_finite

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 50, 1000, -1])
def test_one_bad_entry_is_found(dtype: torch.dtype, bad: float, place: int) -> None:
    t = torch.randn(37, 29, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(t)
    t.view(-1)[place] = bad
    assert not all_finite(t)
    assert not all_finite(t.mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    assert all_finite(torch.tensor([most, -most] * 20, dtype=dtype))


def test_a_nan_between_infinities_is_found() -> None:
    assert not all_finite(torch.tensor([float("inf"), float("nan"), float("-inf")]))


def test_an_empty_tensor_and_a_number() -> None:
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.tensor(1.0))
    assert all_finite(torch.nn.Parameter(torch.ones(2)))
