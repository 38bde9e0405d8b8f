"""LoRA-GA: which singular vectors, and how long."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError
from lorakit.methods.init.lora_ga import lora_ga
from tests.contracts.kinds import Host

OUT, IN, R = 48, 40, 3


def gradient(*batch: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(*batch, OUT, 20, generator=draw, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(*batch, IN, 20, generator=draw, dtype=torch.float64))
    return U * 0.7 ** torch.arange(20, dtype=torch.float64) @ V.mT


def start(G: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    return lora_ga(G, R, generator=torch.Generator().manual_seed(0), **settings)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize("gamma", [16.0, 2.0])
def test_the_factors_are_orthogonal_and_of_the_official_length(
    batch: tuple[int, ...], direction: str, gamma: float
) -> None:
    A, B = start(gradient(*batch), direction=direction, gamma=gamma)
    length = OUT**0.5 / gamma
    eye = (length * torch.eye(R, dtype=torch.float64)).expand(*batch, R, R)
    torch.testing.assert_close(A @ A.mT, eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(B.mT @ B, eye, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("direction", "of_A", "of_B"),
    [("ArB2r", [0, 1, 2], [3, 4, 5]), ("A2rBr", [3, 4, 5], [0, 1, 2]), ("ArBr", [1, 3, 5], [0, 2, 4])],
)
def test_which_singular_vectors(direction: str, of_A: list[int], of_B: list[int]) -> None:
    G = gradient()
    U, _, Vh = torch.linalg.svd(G)
    A, B = start(G, direction=direction)
    for ours, whose in ((A, Vh[of_A]), (B.mT, U.mT[of_B])):
        cosines = torch.nn.functional.cosine_similarity(ours, whose).abs()
        torch.testing.assert_close(cosines, torch.ones(R, dtype=torch.float64), rtol=0, atol=1e-5)


def test_random_takes_each_of_the_first_singular_vectors_once() -> None:
    G = gradient()
    U, _, Vh = torch.linalg.svd(G)
    for seed in range(5):
        A, B = lora_ga(G, R, direction="random", generator=torch.Generator().manual_seed(seed))
        taken = [
            *(A @ Vh[: 2 * R].mT).abs().argmax(-1).tolist(),
            *(B.mT @ U[:, : 2 * R]).abs().argmax(-1).tolist(),
        ]
        assert sorted(taken) == list(range(2 * R))


def test_the_first_step_follows_the_gradient_better_than_a_usual_start() -> None:
    """A descent step changes ``B A`` by ``-(G Aᵀ A + B Bᵀ G)``: for this start the best approximation of rank 2 r."""
    G = gradient()
    A, B = start(G)
    step = G @ A.mT @ A + B @ B.mT @ G
    U, S, Vh = torch.linalg.svd(G)
    best = U[:, : 2 * R] * S[: 2 * R] @ Vh[: 2 * R]
    torch.testing.assert_close(step / (OUT**0.5 / 16), best, rtol=0, atol=1e-4)


def test_the_length_of_the_gradient_does_not_matter() -> None:
    G = gradient()
    for one, other in zip(start(G), start(1e6 * G), strict=True):
        torch.testing.assert_close(one.abs(), other.abs())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"direction": "ArB"}, "direction is one of ArB2r, A2rBr, ArBr, random; got 'ArB'"),
        ({"gamma": 0.0}, "gamma divides the factors.*got 0.0"),
        ({"gamma": float("nan")}, "got nan"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start(gradient(), **settings)


def test_a_matrix_needs_two_singular_vectors_for_each_rank() -> None:
    with pytest.raises(ConfigError, match=r"48 x 40 matrix has 40: choose r <= 20"):
        lora_ga(gradient(), 21)
    A, _ = lora_ga(gradient(), 20)
    assert A.shape == (20, IN)


def test_peft_scales_otherwise() -> None:
    """PEFT leaves ``A`` at norm one and multiplies ``B`` by the singular values of the gradient: another method."""
    peft = pytest.importorskip("peft")
    if peft.__version__ != "0.21.2":
        pytest.skip("the difference was found in PEFT 0.21.2")
    G = 100 * gradient().float()
    model = Host(nn.Linear(IN, OUT))
    model.layer._peft_loraga_grad = G.clone()
    config = peft.LoraConfig(
        target_modules=["layer"], r=R, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).base_model.model.layer
    A, B = start(G)
    torch.testing.assert_close(A.norm(dim=1), torch.full((R,), 0.6580, dtype=A.dtype), rtol=1e-3, atol=0)
    torch.testing.assert_close(B.norm(dim=0), torch.full((R,), 0.6580, dtype=B.dtype), rtol=1e-3, atol=0)
    torch.testing.assert_close(theirs.lora_A["default"].weight.detach().norm(dim=1), torch.ones(R))
    S = torch.linalg.svdvals(G)[R : 2 * R]
    torch.testing.assert_close(
        theirs.lora_B["default"].weight.detach().norm(dim=0), S * OUT**0.25 / 4, rtol=1e-3, atol=0
    )
