"""Kronecker products of stacks, and products with vectors that never form one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorakit.ops import kronecker, kronecker_linear


def random(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def test_a_matrix_is_as_in_torch() -> None:
    W1, W2 = random(2, 3), random(4, 5)
    assert torch.equal(kronecker(W1, W2), torch.kron(W1, W2))


def test_a_stack_is_one_product_for_each_index() -> None:
    W1, W2 = random(2, 3, 4, 1), random(2, 3, 2, 5)
    product = kronecker(W1, W2)
    assert product.shape == (2, 3, 8, 5)
    for i in range(2):
        for j in range(3):
            assert torch.equal(product[i, j], torch.kron(W1[i, j], W2[i, j]))


@pytest.mark.parametrize("rows", [(), (4,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize(
    "sizes", [(2, 3, 4, 5), (5, 4, 3, 2), (1, 1, 3, 4), (3, 4, 1, 1), (8, 1, 1, 8), (1, 8, 8, 1)], ids=str
)
def test_the_product_with_vectors(sizes: tuple[int, int, int, int], rows: tuple[int, ...]) -> None:
    a, c, b, d = sizes
    own = [t.requires_grad_() for t in (random(*rows, c * d), random(a, c), random(b, d))]
    x, W1, W2 = own
    got, want = kronecker_linear(x, W1, W2), x @ torch.kron(W1, W2).T
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    G = torch.randn_like(want)
    for one, other in zip(torch.autograd.grad(got, own, G), torch.autograd.grad(want, own, G), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(2, 8, 4, 4), (8, 2, 4, 4), (32, 32, 32, 32)], ids=str)
def test_the_order_is_the_cheaper_one(sizes: tuple[int, int, int, int]) -> None:
    """Multiplications of the two products, as torch's own counter sees them."""
    from torch.utils.flop_counter import FlopCounterMode

    a, c, b, d = sizes
    with FlopCounterMode(display=False) as counter:
        kronecker_linear(random(7, c * d), random(a, c), random(b, d))
    assert counter.get_total_flops() == 2 * 7 * min(c * b * (d + a), a * d * (c + b))
    assert counter.get_total_flops() < 2 * 7 * a * b * c * d
