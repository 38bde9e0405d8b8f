"""The fused low-rank product against the plain one: values, derivatives, dropout and memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.ops import add_low_rank, add_product, joined, low_rank
from lorakit.ops.low_rank import transformed

SIZES = {"vector": (), "rows": (5,), "tokens": (3, 4), "images": (2, 2, 3), "none": (0,), "empty": (2, 0)}
sizes = pytest.mark.parametrize("size", list(SIZES.values()), ids=list(SIZES))


@pytest.fixture(autouse=True, params=["few", "many"])
def amount(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the result: plain operations for few outputs, the fused function for many."""
    if request.param == "many":
        monkeypatch.setattr(low_rank, "_FEW", 0)


def operands(
    *size: int,
    dtype: torch.dtype = torch.float64,
    grad: bool = True,
    inner: int = 6,
    out: int = 5,
    r: int = 2,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random ``y, x, A, B``."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((*size, out), (*size, inner), (r, inner), (out, r))
    y, x, A, B = (
        torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes
    )
    return y, x, A, B


def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return y + scale * torch.einsum("...i,ri,or->...o", x, A, B)


@sizes
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "nograd"])
def test_it_adds_the_product(size: tuple[int, ...], grad: bool) -> None:
    y, x, A, B = operands(*size)
    expected = plain(y, x, A, B, 1.5)
    with torch.set_grad_enabled(grad):
        got = add_low_rank(y.clone(), x, A, B, 1.5)
    assert got.requires_grad is grad
    torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "nograd"])
def test_it_reuses_the_memory_of_the_base_output(grad: bool) -> None:
    y, x, A, B = operands(3, 4)
    own = y.detach().clone()
    with torch.set_grad_enabled(grad):
        got = add_low_rank(own, x.detach(), A, B)
    assert got is own
    assert got.requires_grad is grad


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "nograd"])
def test_a_base_output_without_a_flat_view_gets_a_new_tensor(grad: bool) -> None:
    y, x, A, B = operands(3, 4)
    own = y.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert not own.is_contiguous()
    before = own.clone()
    with torch.set_grad_enabled(grad):
        got = add_low_rank(own, x, A, B, 0.5)
    torch.testing.assert_close(got.detach(), plain(before, x, A, B, 0.5).detach())


def test_an_input_of_any_layout() -> None:
    y, x, A, B = operands(3, 4)
    strange = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    got = add_low_rank(y.clone(), strange, A, B)
    torch.testing.assert_close(got, plain(y, x, A, B, 1.0))
    got.sum().backward()
    assert strange.grad is not None
    assert strange.grad.shape == strange.shape


NEEDS = [n for n in itertools.product([True, False], repeat=4) if any(n)]


@pytest.mark.parametrize(
    "needs", NEEDS, ids=["".join(c for c, n in zip("yxAB", need, strict=True) if n) for need in NEEDS]
)
def test_first_and_second_derivatives(needs: tuple[bool, ...]) -> None:
    inputs = [
        t.detach().requires_grad_(need) for t, need in zip(operands(2, 3, inner=4, out=3), needs, strict=True)
    ]

    def f(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return add_low_rank(y * 1, x, A, B, 1.5)

    assert torch.autograd.gradcheck(f, inputs)
    if sum(needs[1:]) > 1:  # linear in each alone: no second derivative to check
        assert torch.autograd.gradgradcheck(f, inputs)


def test_second_derivatives_under_dropout() -> None:
    inputs = operands(3, inner=4, out=3)

    def f(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(3)
        return add_low_rank(y * 1, x, A, B, 1.5, 0.4)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def saved_bytes(run: Callable[[], Any], *parameters: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of ``run``, each storage once, without the parameters."""
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()
    assert kept.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["whole", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "bf16"])
def test_it_saves_little_more_than_the_input(dropout: float, dtype: torch.dtype) -> None:
    y, x, A, B = operands(2, 64, dtype=dtype, grad=False, inner=256, out=192, r=8)
    A, B = torch.nn.Parameter(A.float()), torch.nn.Parameter(B.float())
    x.requires_grad_()
    one = saved_bytes(lambda: add_low_rank(y.clone(), x, A, B, 2.0, dropout), A, B)
    assert x.nbytes <= one <= 1.1 * x.nbytes

    def three() -> Tensor:  # as q, k and v do, which share their input
        return torch.stack([add_low_rank(y.clone(), x, A, B, 2.0, dropout) for _ in range(3)])

    assert saved_bytes(three, A, B) <= 1.2 * x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "bf16"])
def test_with_a_frozen_down_projection_it_saves_less_than_the_input(dtype: torch.dtype) -> None:
    y, x, A, B = operands(2, 64, dtype=dtype, grad=False, inner=256, out=192, r=8)
    A, B = A.float(), torch.nn.Parameter(B.float())
    x.requires_grad_()
    kept = saved_bytes(lambda: add_low_rank(y.clone(), x, A, B, 2.0), A, B)
    assert kept <= 0.5 * x.nbytes


def test_the_plain_way_saves_more_under_dropout() -> None:
    """The test above can fail: stock modules keep the dropped copy and the mask."""
    y, x, A, B = operands(2, 64, dtype=torch.float32, grad=False, inner=256, out=192, r=8)
    A, B = torch.nn.Parameter(A), torch.nn.Parameter(B)
    x.requires_grad_()
    assert saved_bytes(lambda: y + torch.dropout(x, 0.1, True) @ A.T @ B.T) > 1.1 * x.nbytes


# ---- dropout ---------------------------------------------------------------------------------------------
def drawn_mask(x: Tensor, seed: int, p: float) -> Tensor:
    """The mask of a run after ``manual_seed(seed)``, read off a run with identity factors."""
    n = x.shape[-1]
    torch.manual_seed(seed)
    ones = torch.ones_like(x)
    with torch.no_grad():
        return add_low_rank(
            torch.zeros_like(x), ones, torch.eye(n, dtype=x.dtype), torch.eye(n, dtype=x.dtype), 1.0, p
        )


def test_dropout_keeps_or_scales_each_entry_and_has_the_right_mean() -> None:
    mask = drawn_mask(torch.empty(200, 50, dtype=torch.float64), 0, 0.3)
    values = mask.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.7], dtype=torch.float64))
    assert abs(float(mask.mean()) - 1) < 4 * (0.3 / 0.7 / mask.numel()) ** 0.5
    assert (mask == 0).any(0).all(), "every column is dropped somewhere"
    assert (mask != 0).any(0).all(), "and kept somewhere"


def test_backward_takes_the_mask_of_forward() -> None:
    y, x, A, B = operands(7, 3)
    mask = drawn_mask(x.detach(), 11, 0.4)
    assert 0 < (mask == 0).sum() < mask.numel()
    torch.manual_seed(11)
    got = add_low_rank(y.clone(), x, A, B, 1.5, 0.4)
    expected = plain(y, x * mask, A, B, 1.5)
    torch.testing.assert_close(got, expected)
    G = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad((got * G).sum(), (y, x, A, B)),
        torch.autograd.grad((expected * G).sum(), (y, x, A, B)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "nograd"])
def test_the_seed_decides_the_mask(grad: bool) -> None:
    y, x, A, B = operands(7)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.set_grad_enabled(grad):
            return add_low_rank(y.clone(), x, A, B, 1.0, 0.5).detach()

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_two_calls_draw_two_masks() -> None:
    y, x, A, B = operands(7)
    torch.manual_seed(0)
    assert not torch.equal(
        add_low_rank(y.clone(), x, A, B, 1.0, 0.5), add_low_rank(y.clone(), x, A, B, 1.0, 0.5)
    )


def test_without_dropout_no_random_number_is_drawn() -> None:
    y, x, A, B = operands(7)
    before = torch.get_rng_state()
    add_low_rank(y.clone(), x, A, B)
    assert torch.equal(torch.get_rng_state(), before)


# ---- dtypes and transforms -------------------------------------------------------------------------------
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "nograd"])
def test_the_result_has_the_dtype_of_the_base_output(grad: bool) -> None:
    y, x, A, B = operands(4, dtype=torch.bfloat16)
    exact = plain(*(t.detach().double() for t in (y, x, A, B)), 1.0)
    wide_A, wide_B = (t.detach().float().requires_grad_() for t in (A, B))
    with torch.set_grad_enabled(grad):
        got = add_low_rank(y.detach().clone(), x, wide_A, wide_B)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=5e-2)
    if grad:
        got.float().sum().backward()
        assert wide_A.grad is not None
        assert wide_A.grad.dtype is torch.float32
        assert x.grad is not None
        assert x.grad.dtype is torch.bfloat16


def test_torch_func_sees_through_it() -> None:
    y, x, A, B = (t.detach() for t in operands(4))

    def loss(A: Tensor, x: Tensor, y: Tensor) -> Tensor:
        assert transformed()
        return add_low_rank(y.clone(), x, A, B, 1.5).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(A, x, y)
    for i in range(4):
        a = A.clone().requires_grad_()
        (expected,) = torch.autograd.grad(plain(y[i], x[i], a, B, 1.5).square().sum(), a)
        torch.testing.assert_close(each[i], expected)
    assert not transformed()


@sizes
def test_add_product(size: tuple[int, ...]) -> None:
    y, _, _, B = operands(*size)
    h = torch.randn(*size, 2, dtype=torch.float64, requires_grad=True)
    own = y.clone()
    got = add_product(own, h, B, 0.5)
    expected = y + 0.5 * torch.einsum("...r,or->...o", h, B)
    torch.testing.assert_close(got, expected)
    G = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad((got * G).sum(), (y, h, B)),
        torch.autograd.grad((expected * G).sum(), (y, h, B)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrix", "stack"])
@pytest.mark.parametrize("dim", [-1, -2])
def test_joining_keeps_the_layout_in_memory(batch: tuple[int, ...], dim: int) -> None:
    one, two = torch.randn(*batch, 4, 5), torch.randn(*batch, 4, 5)
    for turned in (False, True):
        first = one.mT.contiguous().mT if turned else one
        both = joined(first, two, dim)
        assert torch.equal(both, torch.cat([one, two], dim))
        assert (both.mT if turned else both).is_contiguous()
