"""The compiled change of an embedding table against plain operations, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from lorakit.ops import add_lookup


@pytest.fixture
def lookup(library):
    return library.lookup


def case(shape, vocabulary, r, out, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, shape, generator=draw)
    y = torch.randn(*shape, out, generator=draw)
    A = torch.randn(vocabulary, r, generator=draw).T.requires_grad_()
    B = torch.randn(out, r, generator=draw).requires_grad_()
    return y, ids, A, B


def plain(y, ids, A, B, scale, padding=None):
    return y + scale * F.linear(F.embedding(ids, A.mT, padding_idx=padding), B)


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize(
    ("shape", "vocabulary", "r", "out"), [((1,), 5, 1, 3), ((2, 7), 30, 4, 35), ((3, 200), 999, 8, 130)]
)
def test_values_and_gradients(lookup, shape, vocabulary, r, out, padding):
    y, ids, A, B = case(shape, vocabulary, r, out)
    G = torch.randn(y.shape)
    got = lookup(y.clone(), ids, A, B, 0.5, -1 if padding is None else padding)
    exact_A, exact_B = (t.detach().double().requires_grad_() for t in (A, B))
    exact = plain(y.double(), ids, exact_A, exact_B, 0.5, padding)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(got, (A, B), G)
    for one, other in zip(gradients, torch.autograd.grad(exact, (exact_A, exact_B), G.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    assert gradients[0].stride() == A.stride()  # the optimizer meets one layout


def test_it_writes_into_what_it_is_given_and_needs_no_gradient(lookup):
    y, ids, A, B = case((4, 5), 20, 3, 16)
    with torch.no_grad():
        own = y.clone()
        assert lookup(own, ids, A, B, 2.0, -1) is own
        torch.testing.assert_close(own, plain(y, ids, A, B, 2.0))


def test_the_gradient_of_what_was_there_passes_through(lookup):
    y, ids, A, B = case((6,), 20, 3, 16)
    start = y.clone().requires_grad_()
    lookup(start * 2, ids, A, B, 1.0, -1).sum().backward()
    assert torch.equal(start.grad, torch.full_like(start, 2))


def test_second_derivatives(lookup):
    _, ids, A, B = case((5,), 9, 2, 4)
    wide = [A.detach().double().requires_grad_(), B.detach().double().requires_grad_()]
    weights = torch.randn(5, 4)

    def second(function, a, b, dtype):
        out = function(torch.zeros(5, 4, dtype=dtype), ids, a, b, 0.7, -1)
        first = torch.autograd.grad((out**2 * weights.to(dtype)).sum(), (a, b), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (a, b))

    mine = second(lookup, A, B, torch.float32)
    exact = second(lambda y, i, a, b, s, p: plain(y, i, a, b, s), *wide, torch.float64)
    for one, other in zip(mine, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_what_it_does_not_take_is_left_alone(lookup):
    y, ids, A, B = case((2, 3), 10, 2, 4)
    before = y.clone()
    out_of_table = ids.clone()
    out_of_table[0, 0] = 10
    for wrong in (
        (y, ids.int(), A, B),
        (y.double(), ids, A, B),
        (y, ids, A.detach().contiguous(), B),
        (y, out_of_table, A, B),
        (y[..., :3], ids, A, B),
    ):
        assert lookup(*wrong, 1.0, -1) is None
    assert torch.equal(y, before)


def test_an_index_outside_the_table_is_torchs_error(lookup):
    y, ids, A, B = case((2, 3), 10, 2, 4)
    with pytest.raises(IndexError):
        add_lookup(y, ids + 10, A, B)
