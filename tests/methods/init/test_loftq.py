"""LoftQ's turns: what they cannot make worse, and what one of them gives."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lorakit.errors import ConfigError
from lorakit.methods.init.loftq import LoftQ, loftq
from lorakit.ops import quantize_int8, quantize_nf4
from lorakit.ops.truncated_svd import leading_triplets_by_projection

ENCODERS = {"nf4": quantize_nf4, "int8": quantize_int8}
every = pytest.mark.parametrize("form", ENCODERS)
sizes = pytest.mark.parametrize(("size", "r"), [((64, 64), 16), ((128, 128), 8), ((40, 96), 5)])


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(W: Tensor, result: LoftQ) -> float:
    left = W - result.packed.dequantize(W.dtype) - result.B @ result.A
    return float(left.norm() / W.norm())


def plain(W: Tensor, form: str) -> float:
    return float((W - ENCODERS[form](W).dequantize(W.dtype)).norm() / W.norm())


@every
@sizes
@pytest.mark.parametrize("first", ["quantize", "svd"])
def test_the_best_turn_is_kept(form: str, size: tuple[int, int], r: int, first: str) -> None:
    for seed in range(4):
        W = normal(*size, seed=seed)
        result = loftq(W, r, ENCODERS[form], first=first)  # type: ignore[arg-type]
        assert len(result.errors) == 5
        assert distance(W, result) == pytest.approx(min(result.errors), rel=1e-9)
        assert min(result.errors) < plain(W, form)
        one = loftq(W, r, ENCODERS[form], iterations=1, first=first)  # type: ignore[arg-type]
        assert one.errors[0] == result.errors[0]
        assert min(result.errors) <= one.errors[0]


def test_a_turn_can_make_it_worse() -> None:
    """That is why the best is kept: the errors do not always fall."""
    errors = [loftq(normal(64, 64, seed=seed), 16, quantize_nf4).errors for seed in range(12)]
    rises = [e for e in errors if any(later > earlier for earlier, later in pairwise(e))]
    assert rises


@every
@sizes
def test_one_turn_is_the_decomposition_of_the_quantisation_error(
    form: str, size: tuple[int, int], r: int
) -> None:
    W = normal(*size)
    result = loftq(W, r, ENCODERS[form], iterations=1)
    error = W - ENCODERS[form](W).dequantize(W.dtype)
    U, S, Vh = torch.linalg.svd(error, full_matrices=False)
    torch.testing.assert_close(result.B @ result.A, U[:, :r] * S[:r] @ Vh[:r])
    assert result.errors[0] * float(W.norm()) == pytest.approx(float(S[r:].norm()), rel=1e-9)
    torch.testing.assert_close(result.A @ result.A.T, torch.diag(S[:r]), rtol=0, atol=1e-12)
    torch.testing.assert_close(result.B.T @ result.B, torch.diag(S[:r]), rtol=0, atol=1e-12)


@every
def test_the_full_rank_leaves_nothing(form: str) -> None:
    W = normal(24, 40)
    assert loftq(W, 24, ENCODERS[form], iterations=1).errors[0] < 1e-14


@every
def test_one_turn_of_qpissa_quantises_what_the_principal_triplets_leave(form: str) -> None:
    W = normal(48, 64)
    result = loftq(W, 8, ENCODERS[form], iterations=1, first="svd")
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(result.B @ result.A, U[:, :8] * S[:8] @ Vh[:8])
    rest = ENCODERS[form](W - result.B @ result.A).dequantize(W.dtype)
    assert torch.equal(result.packed.dequantize(W.dtype), rest)


def test_a_projection_is_nearly_as_good() -> None:
    W = normal(256, 200)
    draw = torch.Generator().manual_seed(0)
    fast = partial(leading_triplets_by_projection, iterations=4, generator=draw)
    exact = min(loftq(W, 16, quantize_nf4).errors)
    assert min(loftq(W, 16, quantize_nf4, decompose=fast).errors) < 1.01 * exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    W = normal(48, 64).to(dtype)
    result = loftq(W, 8, quantize_nf4)
    assert result.A.dtype is result.B.dtype is torch.float32
    assert min(result.errors) < plain(W.float(), "nf4")


def test_a_weight_of_zeros() -> None:
    result = loftq(torch.zeros(8, 8), 2, quantize_nf4)
    assert result.errors == (0.0,) * 5
    assert not result.packed.dequantize().any()


@pytest.mark.parametrize("options", [{"iterations": 0}, {"iterations": True}, {"first": "pissa"}])
def test_settings_without_meaning_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"iteration|first"):
        loftq(torch.ones(4, 4), 1, quantize_nf4, **options)  # type: ignore[arg-type]
