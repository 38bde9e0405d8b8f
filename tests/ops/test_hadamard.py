"""The Hadamard product of low-rank products against autograd of the plain formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorakit.ops import hadamard_low_rank

batches = pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=["matrix", "stack", "stacks"])


def factors(batch: tuple[int, ...] = (), r1: int = 3, r2: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = [(*batch, 7, r1), (*batch, r1, 9), (*batch, 7, r2), (*batch, r2, 9)]
    return [torch.randn(s, generator=draw, dtype=torch.float64, requires_grad=True) for s in sizes]


def plain(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor, scale: float) -> Tensor:
    return scale * ((B1 @ A1) * (B2 @ A2))


@batches
@pytest.mark.parametrize("scale", [1.0, -0.25])
def test_value_and_gradients_are_those_of_autograd(batch: tuple[int, ...], scale: float) -> None:
    own = factors(batch)
    got, want = hadamard_low_rank(*own, scale), plain(*own, scale)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(hadamard_low_rank(*own, scale), want, rtol=1e-13, atol=1e-13)
    G = torch.randn(want.shape, dtype=torch.float64)
    for one, other in zip(torch.autograd.grad(got, own, G), torch.autograd.grad(want, own, G), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_only_what_is_asked_for_is_differentiated() -> None:
    own = factors()
    for i, factor in enumerate(own):
        fixed = [t if t is factor else t.detach() for t in own]
        (one,) = torch.autograd.grad(hadamard_low_rank(*fixed).square().sum(), factor)
        (other,) = torch.autograd.grad(plain(*own, 1.0).square().sum(), own[i])
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_numeric_gradients_of_both_orders() -> None:
    small = [t.detach()[..., :2, :2].clone().requires_grad_() for t in factors(r1=2)]
    assert torch.autograd.gradcheck(lambda *f: hadamard_low_rank(*f, 0.5), small)
    assert torch.autograd.gradgradcheck(lambda *f: hadamard_low_rank(*f, 0.5), small)


def test_functional_transforms_see_through_it() -> None:
    own = [t.detach() for t in factors()]
    gradient = torch.func.grad(lambda B1: hadamard_low_rank(B1, *own[1:]).square().sum())(own[0])
    B1 = own[0].requires_grad_()
    (want,) = torch.autograd.grad(plain(B1, *own[1:], 1.0).square().sum(), B1)
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-12)


def kept(formula: Callable[[], Tensor]) -> int:
    """Numbers that autograd keeps for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.itemsize
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = formula()
    assert result.requires_grad
    return sum(storages.values())


def test_no_dense_product_is_kept() -> None:
    own = factors()
    assert kept(lambda: hadamard_low_rank(*own, 0.5)) == sum(t.numel() for t in own)
    assert kept(lambda: plain(*own, 0.5)) >= 2 * 7 * 9


def test_gradients_have_the_dtype_of_their_factor() -> None:
    own = [t.detach().float().requires_grad_() for t in factors()]
    with torch.autocast("cpu", torch.bfloat16):
        result = hadamard_low_rank(*own)
    assert result.dtype is torch.bfloat16
    for gradient in torch.autograd.grad(result.float().sum(), own):
        assert gradient.dtype is torch.float32
