"""A block that autocast does not reach."""

from __future__ import annotations

import torch

from lorakit.ops import own_precision


def test_products_keep_the_dtype_of_their_operands() -> None:
    a = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype is torch.bfloat16
        with own_precision(a):
            assert (a @ a).dtype is torch.float32
        assert (a @ a).dtype is torch.bfloat16


def test_a_tensor_without_numbers_is_fine() -> None:
    a = torch.empty(3, 3, device="meta")
    with own_precision(a):
        assert (a @ a).is_meta
