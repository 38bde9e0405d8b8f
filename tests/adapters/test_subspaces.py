"""Subspace similarity against the formula of the LoRA paper, and all that is known of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lorakit as lk
from lorakit.adapters import similarity, subspace_similarity
from lorakit.errors import ConfigError
from tests.adapters.states import linear, normal, random_state


def phi(first: Tensor, second: Tensor, i: int, j: int) -> float:
    """The paper's formula, written out."""
    U1, U2 = (torch.linalg.svd(matrix, full_matrices=False)[2].T for matrix in (first, second))
    return float(torch.linalg.matrix_norm(U1[:, :i].T @ U2[:, :j]) ** 2 / min(i, j))


def test_equals_the_formula_at_every_pair() -> None:
    first, second = normal(4, 30), normal(9, 30, seed=1)
    found = subspace_similarity(first, second)
    assert found.phi.shape == (4, 9)
    assert found.size == 30
    for i in range(1, 5):
        for j in range(1, 10):
            assert found.at(i, j) == pytest.approx(phi(first, second, i, j), abs=1e-12)
    assert found.whole == found.at(4, 9)


def test_is_the_mean_squared_cosine_of_the_principal_angles() -> None:
    first, second = normal(3, 20), normal(5, 20, seed=1)
    Q1, Q2 = (torch.linalg.qr(matrix.T).Q for matrix in (first, second))
    cosines = torch.linalg.svdvals(Q1.T @ Q2)
    assert subspace_similarity(first, second).whole == pytest.approx(float(cosines.square().mean()))


def test_and_one_minus_the_squared_projection_metric_by_p() -> None:
    """With ``d² = p - sum cos²``; the paper's appendix prints ``(1 - d²) / p``, which is another number."""
    first, second = normal(3, 20), normal(3, 20, seed=1)
    P1, P2 = (matrix.T @ torch.linalg.pinv(matrix.T) for matrix in (first, second))
    squared = float((P1 - P2).norm() ** 2) / 2
    found = subspace_similarity(first, second).whole
    assert found == pytest.approx(1 - squared / 3)
    assert found != pytest.approx((1 - squared) / 3)


def test_of_itself_is_one() -> None:
    A = normal(6, 40)
    found = subspace_similarity(A, A)
    assert torch.allclose(found.phi.diagonal(), torch.ones(6, dtype=torch.float64))
    assert found.phi.max() <= 1


def test_is_symmetric() -> None:
    first, second = normal(4, 30), normal(7, 30, seed=1)
    there, back = subspace_similarity(first, second), subspace_similarity(second, first)
    assert torch.allclose(there.phi, back.phi.T, atol=1e-14)


def test_orthogonal_spans_have_nothing_in_common() -> None:
    Q = torch.linalg.qr(normal(30, 30)).Q.T
    mixed = normal(4, 4, seed=1) @ Q[:4], normal(6, 6, seed=2) @ Q[4:10]
    assert subspace_similarity(*mixed).phi.max() < 1e-28


def test_a_space_inside_the_other_counts_as_one() -> None:
    A = normal(3, 30)
    more = torch.cat([A, normal(2, 30, seed=1)])
    assert subspace_similarity(A, more).whole == pytest.approx(1)


def test_another_basis_leaves_all_directions_together_as_they_are_and_only_them() -> None:
    first, second, M = normal(5, 30), normal(5, 30, seed=1), normal(5, 5, seed=2)
    plain, mixed = subspace_similarity(first, second), subspace_similarity(M @ first, second)
    assert mixed.whole == pytest.approx(plain.whole)
    assert subspace_similarity(first, M @ first).whole == pytest.approx(1)
    assert mixed.at(1, 1) != pytest.approx(plain.at(1, 1), rel=1e-3)
    assert mixed.at(2, 5) != pytest.approx(plain.at(2, 5), rel=1e-3)


def test_chance_is_what_random_subspaces_have() -> None:
    """(8, 64) in 512 dimensions: 0.125."""
    found = [subspace_similarity(normal(8, 512, seed=n), normal(64, 512, seed=100 + n)) for n in range(12)]
    mean = torch.stack([one.phi for one in found]).mean(0)
    assert found[0].chance(8, 64) == 0.125
    assert float(mean[-1, -1]) == pytest.approx(0.125, rel=0.05)
    assert float(mean[3, 31]) == pytest.approx(found[0].chance(4, 32), rel=0.15)
    assert found[0].random.shape == (8, 64)
    assert found[0].random[3, 31] == found[0].chance(4, 32) == 32 / 512


def test_fewer_directions_than_rows() -> None:
    thin = normal(6, 2) @ normal(2, 30, seed=1)
    found = subspace_similarity(thin, normal(4, 30, seed=2))
    assert found.phi.shape == (2, 4)
    assert found.at(2, 4) == pytest.approx(phi(thin, normal(4, 30, seed=2), 2, 4))
    with pytest.raises(ConfigError, match=r"phi\(3, 1\) is not defined: the first has 2"):
        found.at(3, 1)
    with pytest.raises(ConfigError, match="not defined"):
        found.at(0, 1)


def test_a_stack_has_the_mean_of_its_matrices() -> None:
    first, second = normal(3, 4, 20), normal(3, 5, 20, seed=1)
    each = torch.stack([subspace_similarity(a, b).phi for a, b in zip(first, second, strict=True)])
    assert torch.allclose(subspace_similarity(first, second).phi, each.mean(0))


@pytest.mark.parametrize(("of", "matrix"), [("A", "A"), ("B", "B"), ("inputs", "BA"), ("outputs", "BA")])
def test_of_two_adapters(of: str, matrix: str) -> None:
    shapes = {"q": linear(12, 15)}
    states = [random_state({"q": lk.LoRA(r=r, alpha=6)}, shapes, seed=r) for r in (3, 5)]
    wanted = []
    for state in states:
        A, B = state.tensors["q"]["lora_A"], state.tensors["q"]["lora_B"]
        wanted.append({"A": A, "B": B.T, "inputs": B @ A, "outputs": (B @ A).T}[of])
    found = similarity(states[0], states[1], "q", of)  # type: ignore[arg-type]
    assert found.size == (15 if of in ("A", "inputs") else 12)
    assert found.phi.shape == (3, 5)
    for i in range(1, 4):
        for j in range(1, 6):
            assert found.at(i, j) == pytest.approx(phi(wanted[0], wanted[1], i, j), abs=1e-10)


def test_the_change_reads_what_a_reads_in_another_order() -> None:
    shapes = {"q": linear(12, 15)}
    states = [random_state({"q": lk.LoRA(r=4)}, shapes, seed=n) for n in range(2)]
    factors, change = (similarity(states[0], states[1], "q", of) for of in ("A", "inputs"))
    assert change.whole == pytest.approx(factors.whole)
    assert change.at(1, 1) != pytest.approx(factors.at(1, 1), rel=1e-3)


def test_dora_counts_by_its_direction() -> None:
    shapes = {"q": linear(12, 15)}
    plain = random_state({"q": lk.LoRA(r=4)}, shapes)
    dora = random_state({"q": lk.DoRA(lk.LoRA(r=4))}, shapes)
    tensors = {**dora.tensors["q"], **plain.tensors["q"]}
    same = lk.AdapterState(dora.spec, {"q": tensors})
    for of in ("A", "B", "inputs", "outputs"):
        assert similarity(plain, same, "q", of).whole == pytest.approx(1)


def test_what_cannot_be_compared() -> None:
    shapes = {"q": linear(12, 15)}
    a, b = (random_state({"q": lk.LoRA(r=4)}, shapes, seed=n) for n in range(2))
    fresh = lk.AdapterState(a.spec, {"q": {**a.tensors["q"], "lora_B": torch.zeros(12, 4)}})
    with pytest.raises(ConfigError, match="second adapter changes nothing at 'q'"):
        similarity(a, fresh, "q", "inputs")
    bad = lk.AdapterState(a.spec, {"q": {**a.tensors["q"], "lora_B": torch.full((12, 4), torch.nan)}})
    for of in ("B", "inputs"):
        with pytest.raises(ConfigError, match="NaN or an infinity"):
            similarity(a, bad, "q", of)
    with pytest.raises(ConfigError, match="of is one of 'A'"):
        similarity(a, b, "q", "C")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="first adapter has no target 'k'"):
        similarity(a, b, "k")
    wide = random_state({"q": lk.LoRA(r=4)}, {"q": linear(12, 16)})
    with pytest.raises(ConfigError, match="12 x 15 in the first adapter and of 12 x 16"):
        similarity(a, wide, "q")
    with pytest.raises(ConfigError, match="loha"):
        similarity(random_state({"q": lk.LoHa(r=2)}, shapes), b, "q")
    with pytest.raises(ConfigError, match="equal last sizes"):
        subspace_similarity(normal(2, 3), normal(2, 4))
    with pytest.raises(ConfigError, match="zeros has no directions"):
        subspace_similarity(normal(2, 3), torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ConfigError, match="second matrix holds a NaN"):
        subspace_similarity(normal(2, 3), normal(2, 3) / 0)
