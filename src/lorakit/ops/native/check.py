"""Whether a library computes what it should: ``python -m lorakit.ops.native.check FOLDER`` fails if it does not.

The build runs this in a process of its own, which may die of a library that is not for this computer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lorakit.ops.native.load import LIBRARY, Decode, Lookup, Product, read_library
from lorakit.ops.native.training import AttentionInputs, Kernels
from lorakit.ops.nf4 import quantize_nf4

# tokens, width in, width out, rank: less than a vector, parts of tiles, work for several threads.
_SIZES = ((1, 40, 35, 1), (70, 130, 67, 5), (300, 1030, 64, 16))


def check(product: Product) -> None:
    """Compare outputs and gradients with the formula in float64.

    Raises:
        AssertionError: They differ.
    """
    draw = torch.Generator().manual_seed(0)
    for tokens, n, out, r in _SIZES:
        y, G = (torch.randn(tokens, out, generator=draw) for _ in range(2))
        x, A, B = (torch.randn(s, generator=draw) for s in ((tokens, n), (r, n), (out, r)))
        inputs = [t.requires_grad_() for t in (x, A, B)]
        exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
        exact = y.double() + 0.5 * exact_inputs[0] @ exact_inputs[1].T @ exact_inputs[2].T
        got = product(y.clone(), x, A, B, 0.5)
        assert got is not None, "it refuses plain float32 tensors"
        gradients = torch.autograd.grad(got, inputs, G)
        exact_gradients = torch.autograd.grad(exact, exact_inputs, G.double())
        _assert_near((got, *gradients), (exact, *exact_gradients))


def _assert_near(found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for one, other in zip(found, exact, strict=True):
        size = float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * size)


def check_lookup(lookup: Lookup) -> None:
    """Compare outputs and gradients of the change of a table with the formula in float64.

    Raises:
        AssertionError: They differ.
    """
    draw = torch.Generator().manual_seed(0)
    for tokens, vocabulary, out, r in _SIZES:
        ids = torch.randint(vocabulary, (tokens,), generator=draw)
        y, G = (torch.randn(tokens, out, generator=draw) for _ in range(2))
        A = torch.randn(vocabulary, r, generator=draw).T.requires_grad_()
        B = torch.randn(out, r, generator=draw).requires_grad_()
        got = lookup(y.clone(), ids, A, B, 0.5, -1)
        assert got is not None, "it refuses plain float32 tensors"
        exact_inputs = [t.detach().double().requires_grad_() for t in (A, B)]
        exact = y.double() + 0.5 * exact_inputs[0].T[ids] @ exact_inputs[1].T
        gradients = torch.autograd.grad(got, (A, B), G)
        _assert_near((got, *gradients), (exact, *torch.autograd.grad(exact, exact_inputs, G.double())))


def check_nf4(decode: Decode) -> None:
    """Compare decoded values with those of plain operations, bit for bit.

    Raises:
        AssertionError: They differ.
    """
    for numbers in (1, 97, 300_001):  # less than a vector, a short block, work for several threads
        packed = quantize_nf4(torch.randn(numbers, generator=torch.Generator().manual_seed(0)), 64)
        for dtype in (torch.float32, torch.bfloat16):
            got = decode(packed.codes, packed.scales(), torch.empty(numbers, dtype=dtype), 0, 64)
            assert got is not None, "it refuses plain codes"
            assert torch.equal(got, packed.values().to(dtype)), "NF4 has other values"


def check_training(kernels: Kernels) -> None:
    """Compare what a training step does between its products with the formulas in float64, derivatives too.

    Raises:
        AssertionError: They differ.
    """
    draw = torch.Generator().manual_seed(0)
    x, up, dy = (torch.randn(70, 130, generator=draw) for _ in range(3))
    weight = 0.5 + torch.rand(130, generator=draw)

    def beside(
        formula: Callable[..., Tensor], inputs: Sequence[Tensor], found: Sequence[Tensor], d: Tensor
    ) -> None:
        exact_inputs = [t.double().requires_grad_() for t in inputs]
        exact = formula(*exact_inputs)
        _assert_near(found, (exact, *torch.autograd.grad(exact, exact_inputs, d.double())))

    y, factors = kernels.rms_norm(x, weight, 1e-6)
    dx = kernels.rms_norm_back(dy, y, weight, factors)
    beside(
        lambda x: weight.double() * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt(), (x,), (y, dx), dy
    )
    gates = kernels.swiglu(x, up), *kernels.swiglu_back(dy, x, up)
    beside(lambda gate, up: functional.silu(gate) * up, (x, up), gates, dy)
    targets, gradient = torch.arange(70), torch.empty_like(x)
    losses = kernels.cross_entropy(x, targets, gradient)
    beside(
        lambda x: functional.cross_entropy(x, targets, reduction="none"), (x,), (losses, gradient), torch.ones(70)
    )  # fmt: skip
    tokens, n = 19, 64
    q, k, v, dy = (torch.randn(tokens, h * n, generator=draw) for h in (4, 2, 2, 4))
    cos, sin = torch.ones(tokens, n), torch.zeros(tokens, n)  # nothing turns
    given = AttentionInputs(q, k, v, cos, sin, torch.tensor([0, tokens]), 0.1)
    y, logs = kernels.attention(given)
    back = kernels.attention_back(dy, given, y, logs)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.view(tokens, -1, n).transpose(0, 1) for t in (q, k, v))
        k, v = (t.repeat_interleave(2, 0) for t in (k, v))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1)
        return seen.transpose(0, 1).reshape(tokens, -1)

    beside(attention, (q, k, v), (y, *back), dy)


if __name__ == "__main__":
    library = read_library(Path(sys.argv[1]))
    check(library.product)
    check_lookup(library.lookup)
    check_nf4(library.decode_nf4)
    check_training(Kernels(str(Path(sys.argv[1]) / LIBRARY)))
