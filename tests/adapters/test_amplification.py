"""The amplification factor against its definition, and where it is known beforehand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lorakit as lk
from lorakit.adapters import amplification
from lorakit.adapters.change import as_lora, dense_change
from lorakit.core import AdapterSpec, Shape
from lorakit.errors import ConfigError
from tests.adapters.states import change, linear, normal, random_state


def definition(change: Tensor, W: Tensor, r: int) -> tuple[float, float]:
    """``||dW_r||`` and ``||Uᵀ W V||``, by the dense change."""
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    return float(S[:r].norm()), float((U[:, :r].T @ W @ Vh[:r].T).norm())


def lora_of(A: Tensor, B: Tensor) -> lk.AdapterState:
    """``B A`` as an adapter of one target."""
    method, tensors = as_lora(A, 2 * B, None, scale=0.5, dtype=torch.float64)
    return lk.AdapterState(AdapterSpec({"q": method}, {"q": linear(B.shape[0], A.shape[1])}), {"q": tensors})


@pytest.mark.parametrize("r", [None, 1, 3])
def test_equals_the_definition(r: int | None) -> None:
    W = normal(12, 15)
    state = random_state({"q": lk.LoRA(r=3, alpha=5)}, {"q": linear(12, 15)}, seed=1)
    found = amplification(state, "q", W, r=r)
    norm, within = definition(change(state), W, r or 3)
    assert found.r == (r or 3)
    assert found.change == pytest.approx(norm)
    assert found.within == pytest.approx(within)
    assert found.factor == pytest.approx(norm / within)
    assert found.whole == pytest.approx(float(change(state).norm()))
    assert found.weight == pytest.approx(float(W.norm()))
    assert found.relative == pytest.approx(float(change(state).norm() / W.norm()))
    assert found.top is None


@pytest.mark.parametrize("c", [0.25, 3.0])
def test_a_multiple_of_the_truncated_weight_is_amplified_by_that(c: float) -> None:
    W = normal(20, 16)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    found = amplification(lora_of(Vh[:4], c * U[:, :4] * S[:4]), "q", W, top=True)
    assert found.factor == pytest.approx(c, rel=1e-12)
    assert found.within == pytest.approx(float(S[:4].norm()))
    assert found.top == pytest.approx(float(S[:4].norm()))


def test_random_directions_see_what_is_foretold() -> None:
    W = normal(120, 90)
    seen = []
    for seed in range(30):
        state = random_state({"q": lk.LoRA(r=6)}, {"q": linear(120, 90)}, seed=seed)
        seen.append(amplification(state, "q", W).within)
    expected = amplification(state, "q", W).random
    assert expected == pytest.approx(float(W.norm()) * 6 / math.sqrt(120 * 90))
    assert math.sqrt(sum(v * v for v in seen) / len(seen)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("r", "printed"), [(4, 0.02), (64, 0.33)])
def test_the_papers_random_directions(r: int, printed: float) -> None:
    """Table 7, GPT-3: ``||W_q|| = 61.95`` at 12,288 x 12,288; 0.020 and 0.323, printed as 0.02 and 0.33."""
    W = normal(512, 512)
    W *= 61.95 / W.norm()
    state = random_state({"q": lk.LoRA(r=r)}, {"q": linear(512, 512)})
    at_gpt3 = amplification(state, "q", W).random * 512 / 12288
    assert at_gpt3 == pytest.approx(61.95 * r / 12288)
    assert at_gpt3 == pytest.approx(printed, abs=0.01)


def test_a_base_that_does_nothing_there_is_amplified_without_bound() -> None:
    W = torch.zeros(8, 8, dtype=torch.float64)
    W[4:, 4:] = normal(4, 4)
    A, B = torch.zeros(2, 8, dtype=torch.float64), torch.zeros(8, 2, dtype=torch.float64)
    A[0, 0] = A[1, 1] = B[0, 0] = B[1, 1] = 1
    assert amplification(lora_of(A, B), "q", W).factor == math.inf


def test_a_fresh_adapter_amplifies_nothing() -> None:
    found = amplification(
        lora_of(normal(2, 8), torch.zeros(8, 2, dtype=torch.float64)), "q", normal(8, 8), top=True
    )
    assert (found.r, found.change, found.within, found.factor, found.relative, found.top) == (
        0,
        0,
        0,
        0,
        0,
        0,
    )


def test_directions_that_the_factors_have_twice_count_once() -> None:
    A, B, W = normal(2, 9), normal(8, 2, seed=1), normal(8, 9, seed=2)
    twice = lora_of(torch.cat([A, A]), torch.cat([B, B], 1))
    found = amplification(twice, "q", W)
    assert found.r == 2
    assert found.within == pytest.approx(amplification(lora_of(A, B), "q", W).within)


def test_a_stack_counts_as_a_whole() -> None:
    shape = Shape("parameter", batch=(3,), out=8, in_=9, stored=(3, 8, 9))
    W = normal(3, 8, 9)
    state = random_state({"q": lk.LoRA(r=2)}, {"q": shape}, seed=1)
    found = amplification(state, "q", W)
    each = [definition(d, w, 2) for d, w in zip(change(state), W, strict=True)]
    assert found.change == pytest.approx(math.hypot(*(norm for norm, _ in each)))
    assert found.within == pytest.approx(math.hypot(*(within for _, within in each)))
    assert found.random == pytest.approx(float(W.norm()) * 2 / math.sqrt(72))


def test_dora_counts_with_its_magnitude() -> None:
    W = normal(12, 15)
    state = random_state({"q": lk.DoRA(lk.LoRA(r=3))}, {"q": linear(12, 15)}, seed=1)
    true = dense_change(state, "q", {"q": W})
    found = amplification(state, "q", W)
    norm, within = definition(true, W, 3)
    assert (found.r, found.change, found.within) == (3, pytest.approx(norm), pytest.approx(within))
    assert found.whole == pytest.approx(float(true.norm()))
    assert found.whole > found.change


def test_methods_without_factors_need_a_number_of_directions() -> None:
    W = normal(12, 15)
    state = random_state({"q": lk.LoHa(r=2, alpha=1)}, {"q": linear(12, 15)}, seed=1)
    with pytest.raises(ConfigError, match="has no rank of its own"):
        amplification(state, "q", W)
    found = amplification(state, "q", W, r=4)
    norm, within = definition(change(state), W, 4)
    assert (found.change, found.within) == (pytest.approx(norm), pytest.approx(within))
    assert found.whole == pytest.approx(float(change(state).norm()))


def test_a_wide_weights_own_directions_by_iteration() -> None:
    W = (
        torch.linalg.qr(normal(1100, 40)).Q
        @ torch.diag(0.8 ** torch.arange(40).double())
        @ torch.linalg.qr(normal(1100, 40, seed=1)).Q.T
    )
    found = amplification(random_state({"q": lk.LoRA(r=4)}, {"q": linear(1100, 1100)}), "q", W, top=True)
    assert found.top == pytest.approx(math.sqrt(sum(0.8 ** (2 * k) for k in range(4))), rel=1e-9)


def test_half_precision_weights() -> None:
    state = random_state({"q": lk.LoRA(r=3)}, {"q": linear(12, 15)}, dtype=torch.float16)
    W = normal(12, 15).bfloat16()
    assert amplification(state, "q", W) == amplification(state, "q", W.double())


def test_mistakes() -> None:
    state = random_state({"q": lk.LoRA(r=3)}, {"q": linear(12, 15)})
    with pytest.raises(ConfigError, match=r"should have the size \(12, 15\); it has \(15, 12\)"):
        amplification(state, "q", normal(15, 12))
    with pytest.raises(ConfigError, match="NaN or an infinity"):
        amplification(state, "q", normal(12, 15) / 0)
    for r in (0, 1.5, True):
        with pytest.raises(ConfigError, match="number of directions"):
            amplification(state, "q", normal(12, 15), r=r)  # type: ignore[arg-type]
