"""The fused parts of a decoder beside their formulas in float64, with derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops import fused
from lorakit.ops.native.training import ProductInputs, kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason="the compiled products are not built")


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def assert_same(
    mine: Callable[..., Tensor | None], formula: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """Outputs and gradients of a function of the inputs, beside the formula in float64."""
    near = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    y, expected = mine(*near), formula(*exact)
    assert y is not None
    dy = drawn(*y.shape, seed=9)
    found = (y, *torch.autograd.grad(y, near, dy))
    true = (expected, *torch.autograd.grad(expected, exact, dy.double()))
    for one, other in zip(found, true, strict=True):
        size = float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-6 * max(size, 1))


@pytest.mark.parametrize("shape", [(1, 7), (5, 64), (3, 40, 576), (2, 3, 33)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    weight = drawn(shape[-1], seed=1).abs() + 0.5

    def formula(x: Tensor) -> Tensor:
        return weight.double() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    assert_same(lambda x: fused.rms_norm(x, weight, 1e-5), formula, [drawn(*shape)])


@pytest.mark.parametrize("shape", [(1, 3), (5, 64), (3, 40, 577)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    inputs = [10 * drawn(*shape), drawn(*shape, seed=1)]
    assert_same(fused.swiglu, lambda gate, up: F.silu(gate) * up, inputs)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers' Llama does; ``x`` is ``(heads, tokens, n)``."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


@pytest.mark.parametrize(
    ("heads", "kv_heads", "n", "lengths"),
    [(9, 3, 64, (5, 1, 90, 33)), (4, 4, 32, (17,)), (8, 1, 16, (40, 3)), (2, 1, 128, (130, 16, 48))],
)
def test_document_attention(heads: int, kv_heads: int, n: int, lengths: tuple[int, ...]) -> None:
    tokens = sum(lengths)
    q, k, v = (drawn(1, tokens, h * n, seed=s) for s, h in enumerate((heads, kv_heads, kv_heads)))
    angles = torch.cat([torch.arange(length) for length in lengths])[:, None] * drawn(n // 2)
    cos, sin = (f(torch.cat([angles, angles], dim=1))[None] for f in (torch.cos, torch.sin))
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    library = kernels()
    assert library is not None
    if not library.takes_heads(n):
        assert fused.document_attention(q, k, v, cos, sin, borders, 0.3) is None
        return

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        per_head = [t[0].view(tokens, -1, n).transpose(0, 1) for t in (q, k, v)]
        pieces = []
        for begin, end in zip(borders.tolist()[:-1], borders.tolist()[1:], strict=True):
            c, s = cos[0, begin:end].double(), sin[0, begin:end].double()
            qs, ks, vs = (t[:, begin:end] for t in per_head)
            ks, vs = (t.repeat_interleave(heads // kv_heads, dim=0) for t in (ks, vs))
            pieces.append(
                F.scaled_dot_product_attention(
                    turned(qs, c, s), turned(ks, c, s), vs, is_causal=True, scale=0.3
                )
            )
        return torch.cat(pieces, dim=1).transpose(0, 1).reshape(1, tokens, heads * n)

    assert_same(lambda q, k, v: fused.document_attention(q, k, v, cos, sin, borders, 0.3), formula, [q, k, v])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_document_is_the_same_bit_for_bit_whatever_lies_beside_it(threads: int) -> None:
    lengths, heads, kv_heads, n = (33, 70, 12), 9, 3, 64
    tokens = sum(lengths)
    q, k, v = (drawn(1, tokens, h * n, seed=h) for h in (heads, kv_heads, kv_heads))
    cos, sin = (drawn(1, tokens, n, seed=s) for s in (5, 6))
    dy = drawn(1, tokens, heads * n, seed=7)

    def run(part: slice, borders: list[int]) -> list[Tensor]:
        near = [t[:, part].clone().requires_grad_() for t in (q, k, v)]
        y = fused.document_attention(*near, cos[:, part], sin[:, part], torch.tensor(borders), 0.125)
        assert y is not None
        return [y, *torch.autograd.grad(y, near, dy[:, part])]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = run(slice(0, tokens), [0, 33, 103, 115])
        alone = run(slice(33, 103), [0, 70])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(whole, alone, strict=True):
        assert torch.equal(one[:, 33:103], other)


@pytest.mark.parametrize("size", [(1, 5), (7, 64), (3, 49_157)])
def test_cross_entropy(size: tuple[int, int]) -> None:
    logits = 8 * drawn(*size)
    logits[0, -1] = -torch.inf  # an entry that is ruled out
    targets = torch.arange(size[0])
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    (expected,) = torch.autograd.grad(losses.sum(), exact)
    gradient = torch.empty_like(logits)
    found = fused.cross_entropy(logits, targets, gradient)
    assert found is not None
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(fused.cross_entropy(logits, targets), found)  # type: ignore[arg-type]
    assert torch.equal(fused.cross_entropy(logits, targets, logits), found)  # type: ignore[arg-type]  # in its place
    assert torch.equal(logits, gradient)


def test_what_is_not_finite_comes_through() -> None:
    x = torch.ones(2, 40)
    x[1, 3] = torch.nan
    one = torch.ones(40)
    assert fused.rms_norm(x, one, 1e-5).isnan().any(1).tolist() == [False, True]  # type: ignore[union-attr]
    assert fused.swiglu(x, x).isnan().any(1).tolist() == [False, True]  # type: ignore[union-attr]
    assert fused.cross_entropy(x, torch.zeros(2, dtype=torch.long)).isnan().tolist() == [False, True]  # type: ignore[union-attr]


def test_what_is_left_to_torch() -> None:
    x, one = torch.ones(2, 8), torch.ones(8)
    assert fused.rms_norm(x.double(), one.double(), 1e-5) is None
    assert fused.rms_norm(x, one.clone().requires_grad_(), 1e-5) is None
    assert fused.swiglu(x.bfloat16(), x.bfloat16()) is None
    assert fused.swiglu(x.to("meta"), x.to("meta")) is None
    assert torch.func.vmap(lambda t: t if fused.swiglu(t, t) is None else t + 1)(x).equal(x)


Layers = list[tuple[int, int, float]]


def readings(width: int, layers: Layers, *, bias: bool = False) -> tuple[list[fused.Reading], list[Tensor]]:
    """Layers of a width, each of some outputs, rank and scale; and their factors."""
    made = [
        fused.Reading(
            drawn(out, width, seed=out) / 8,
            drawn(out, seed=out + 1) if bias else None,
            drawn(r, width, seed=r + out).requires_grad_(),
            drawn(out, r, seed=r + out + 1).requires_grad_(),
            scale,
        )
        for out, r, scale in layers
    ]
    return made, [t for reading in made for t in (reading.A, reading.B)]


def exactly(x: Tensor, reading: fused.Reading, A: Tensor, B: Tensor) -> Tensor:
    """The formula, in float64."""
    bias = 0 if reading.bias is None else reading.bias.double()
    return x @ reading.weight.double().T + bias + reading.scale * x @ A.T @ B.T


def assert_gradients(ys: list[Tensor], inputs: list[Tensor], true: list[Tensor], exact: list[Tensor]) -> None:
    directions = [drawn(*y.shape, seed=8) for y in ys]
    found = (*ys, *torch.autograd.grad(ys, inputs, directions))
    expected = (*true, *torch.autograd.grad(true, exact, [d.double() for d in directions]))
    for one, other in zip(found, expected, strict=True):
        size = float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=4e-6 * max(size, 1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("learning_x", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 130, 1000])
@pytest.mark.parametrize("layers", [[(33, 3, 0.5), (64, 8, 2.0), (5, 1, -1.0)], [(576, 16, 0.25)]])
def test_layers_that_read_one_input(layers: Layers, tokens: int, learning_x: bool, bias: bool) -> None:
    made, factors = readings(40, layers, bias=bias)
    x = drawn(1, tokens, 40).requires_grad_(learning_x)
    exact, *exact_factors = (t.detach().double().requires_grad_() for t in (x, *factors))
    pairs = zip(made, exact_factors[::2], exact_factors[1::2], strict=True)
    expected = [exactly(exact, reading, A, B) for reading, A, B in pairs]
    ys = fused.read(x, made)
    assert ys is not None
    first = [x] if learning_x else []
    first_exact = [exact] if learning_x else []
    assert_gradients(list(ys), first + factors, expected, first_exact + exact_factors)


@pytest.mark.parametrize("learning_x", [True, False])
@pytest.mark.parametrize("tokens", [1, 23, 130, 1000])
@pytest.mark.parametrize("width", [33, 96])
def test_layers_behind_a_gate(width: int, tokens: int, learning_x: bool) -> None:
    (gate, up), first = readings(40, [(width, 3, 0.5), (width, 8, 2.0)])
    (down,), last = readings(width, [(40, 4, 1.5)])
    factors = [*first, *last]
    x = drawn(1, tokens, 40).requires_grad_(learning_x)
    exact, *f = (t.detach().double().requires_grad_() for t in (x, *factors))
    through = F.silu(exactly(exact, gate, *f[0:2])) * exactly(exact, up, *f[2:4])
    y = fused.read_gated(x, gate, up, down)
    assert y is not None
    first_exact = [exact] if learning_x else []
    assert_gradients(
        [y], ([x] if learning_x else []) + factors, [exactly(through, down, *f[4:6])], first_exact + f
    )


def test_products_are_the_same_bit_for_bit_whatever_the_threads() -> None:
    library = kernels()
    assert library is not None
    tokens, n, out, ranks = 900, 40, 96, (3, 8)
    Bs = [drawn(r, out, seed=r) for r in ranks]
    given = ProductInputs(drawn(tokens, n), drawn(sum(ranks), n), Bs, (0.5, 2.0))
    dz, next_dh = drawn(tokens, out, seed=5), drawn(tokens, 4, seed=6)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        ys = [drawn(tokens, out, seed=s) for s in (3, 4)]
        h, z = library.add_products(given, ys, gated=True)
        dys, dx, dA, dBs, next_dA = library.gated_products_back(given, h, ys, dz, next_dh, onward=True)
        return [*ys, h, z, *dys, dx, dA, *dBs, next_dA]  # type: ignore[list-item]

    before = torch.get_num_threads()
    try:
        one, other = run(1), run(2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_of_layers_is_left_to_torch() -> None:
    (reading,), _ = readings(40, [(33, 3, 0.5)])
    x = drawn(2, 4, 40)
    assert fused.read(x.double(), [reading]) is None
    assert fused.read(x.mT.contiguous().mT, [reading]) is None  # not in rows
    assert fused.read(x, [reading._replace(weight=reading.weight.bfloat16())]) is None
    assert fused.read(x, [reading._replace(weight=reading.weight.clone().requires_grad_())]) is None
    (up,), _ = readings(40, [(34, 3, 0.5)])
    assert fused.read_gated(x, reading, up, reading) is None  # a gate of another size
