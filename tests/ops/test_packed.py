"""The product with a packed matrix: values, derivatives, and what is kept for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops import Packed, packed_linear, quantize_int8, quantize_nf4

FORMS = {
    "nf4": quantize_nf4,
    "nf4-plain": lambda W: quantize_nf4(W, 32, double_quant=False),
    "int8": quantize_int8,
}
EVERY = pytest.mark.parametrize("form", FORMS)
SIZES = pytest.mark.parametrize("size", [(8, 6), (7, 9), (130, 100), (600, 1024), (1100, 515)])


def packed(form: str, *size: int) -> Packed:
    return FORMS[form](torch.randn(*size, generator=torch.Generator().manual_seed(2)))


def vectors(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@EVERY
@SIZES
@pytest.mark.parametrize("tokens", [(1,), (2, 3), (), (200,)], ids=str)
def test_it_is_the_product_with_the_values(form: str, size: tuple[int, int], tokens: tuple[int, ...]) -> None:
    W = packed(form, *size)
    x, bias = vectors(*tokens, size[1]), vectors(size[0])
    dense = W.dequantize(torch.float64)
    for b in (None, bias):
        torch.testing.assert_close(packed_linear(x, W, b), F.linear(x, dense, b), rtol=0, atol=1e-11)


@EVERY
@SIZES
def test_gradients(form: str, size: tuple[int, int]) -> None:
    W = packed(form, *size)
    x, bias = vectors(2, 3, size[1]).requires_grad_(), vectors(size[0]).requires_grad_()
    G = vectors(2, 3, size[0])
    got = torch.autograd.grad((packed_linear(x, W, bias) * G).sum(), [x, bias])
    want = torch.autograd.grad((F.linear(x, W.dequantize(torch.float64), bias) * G).sum(), [x, bias])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@EVERY
def test_any_derivative_can_be_taken(form: str) -> None:
    W = packed(form, 5, 7)
    assert torch.autograd.gradgradcheck(lambda x: packed_linear(x, W) ** 3, vectors(2, 7).requires_grad_())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(form: str, dtype: torch.dtype) -> None:
    W = packed(form, 700, 512)  # several tiles, whose sum must not be rounded at each of them
    x = vectors(4, 512, dtype=dtype).requires_grad_()
    y = packed_linear(x, W)
    assert y.dtype is dtype
    exact = x.detach().double() @ W.dequantize(torch.float64).T
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * float(exact.abs().max())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance)
    (dx,) = torch.autograd.grad(y.sum(), x)
    exact = W.dequantize(torch.float64).sum(0).expand(4, -1)
    torch.testing.assert_close(dx.double(), exact, rtol=0, atol=tolerance)


@EVERY
def test_only_codes_and_scales_are_kept_for_the_backward_pass(form: str) -> None:
    W = packed(form, 256, 512)
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.numel() * t.element_size())
        return t

    x = vectors(3, 512, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = packed_linear(x, W)
    assert sum(kept) == W.nbytes
    assert W.nbytes < 256 * 512 * 4 / 3
    y.sum().backward()
    assert x.grad is not None


@EVERY
def test_changing_the_codes_before_the_backward_pass_is_noticed(form: str) -> None:
    W = packed(form, 8, 6)
    y = packed_linear(vectors(2, 6).requires_grad_(), W)
    W.tensors["codes"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


@EVERY
def test_torch_func_sees_through_it(form: str) -> None:
    W = packed(form, 5, 7)
    x, dense = vectors(3, 7), W.dequantize(torch.float64)
    got = torch.func.vmap(torch.func.jacrev(lambda row: packed_linear(row, W)))(x)
    torch.testing.assert_close(got, dense.expand(3, -1, -1), rtol=0, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(packed_linear(dual, W)).tangent
    torch.testing.assert_close(tangent, dense.sum(-1).expand(3, -1), rtol=0, atol=1e-12)


def test_inference_mode_and_no_rows() -> None:
    W = packed("nf4", 5, 7)
    with torch.inference_mode():
        assert packed_linear(vectors(2, 7), W).shape == (2, 5)
    assert packed_linear(vectors(0, 7), W).shape == (0, 5)
    x = vectors(2, 7).requires_grad_()
    packed_linear(x, W).sum().backward()  # the tables that inference mode made serve here too
    assert x.grad is not None


def test_another_width_is_refused() -> None:
    with pytest.raises(RuntimeError, match="7 features to 5"):
        packed_linear(vectors(2, 6), packed("int8", 5, 7))
