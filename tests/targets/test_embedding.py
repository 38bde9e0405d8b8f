"""Embeddings: looked up and never multiplied, scaled ones included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import lorakit as lk
from lorakit.targets import EmbeddingTarget, find
from tests.contracts.kinds import Host
from tests.contracts.pairs import close

TOKENS = torch.tensor([[1, 0, 4], [4, 4, 2]])


class Doubling(nn.Embedding):
    """Scales its rows, without saying by how much."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Shifting(nn.Embedding):
    """No multiple of the looked-up rows at all."""

    embed_scale = 2.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2 + 1


def adapted(layer: nn.Module) -> tuple[Host, EmbeddingTarget, Tensor]:
    torch.manual_seed(0)
    model = Host(layer).double()
    lk.attach(model, lk.LoRA(r=2, alpha=4), ["layer"], name="a", dtype=torch.float64)
    A, B = (p for n, p in model.named_parameters() if "lorakit" in n)
    with torch.no_grad():
        A.normal_()
    table = model.layer._parameters["weight"].detach() + 2 * (B @ A).T
    (target,) = find(model, ["layer"])
    assert isinstance(target, EmbeddingTarget)
    return model, target, table


def test_a_plain_table() -> None:
    model, target, table = adapted(nn.Embedding(6, 3))
    assert (target.out, target.in_, target.gain, target.binding) == (3, 6, 1.0, "forward")
    close(model(TOKENS), table[TOKENS], 1e-14)


@pytest.mark.parametrize("scale", [2.5, 48.0**0.5])
def test_a_scaled_table_of_gemma_is_hooked_and_scales_the_change_too(scale: float) -> None:
    model, target, table = adapted(Gemma3TextScaledWordEmbedding(6, 3, 0, embed_scale=scale))
    assert target.binding == "forward"
    assert target.gain == pytest.approx(scale, rel=1e-6)
    close(model(TOKENS), table[TOKENS] * float(model.layer.embed_scale), 1e-13)
    assert lk.report(model).never_ran == ()


@pytest.mark.parametrize(
    ("layer", "expected"),
    [(Doubling(6, 3), lambda y: 2 * y), (Shifting(6, 3), lambda y: 2 * y + 1)],
    ids=["double", "shift"],
)
def test_any_other_forward_binds_the_weight_and_is_right(layer: nn.Module, expected: object) -> None:
    model, target, table = adapted(layer)
    assert target.binding == "parameter"
    close(model(TOKENS), expected(table[TOKENS]), 1e-13)  # type: ignore[operator]


def test_the_padding_token_gets_no_gradient() -> None:
    model, _, _ = adapted(nn.Embedding(6, 3, padding_idx=4))
    model(TOKENS).sum().backward()
    (A, _) = (p for n, p in model.named_parameters() if "lorakit" in n)
    assert A.grad is not None
    assert (A.grad[:, 4] == 0).all()
    assert (A.grad[:, [0, 1, 2]] != 0).all()
    assert (A.grad[:, [3, 5]] == 0).all(), "nor do tokens that are not in the batch"


def test_the_factor_is_laid_out_for_lookups() -> None:
    model, target, _ = adapted(nn.Embedding(6, 3))
    (A, _) = (p for n, p in model.named_parameters() if "lorakit" in n)
    assert A.shape == (2, 6)
    assert A.mT.is_contiguous()
    assert target.arrange("B", torch.ones(3, 2)).is_contiguous()
    assert target.arrange("A", torch.ones(3)).shape == (3,)


def test_apply_and_add_low_rank_are_what_the_layer_computes() -> None:
    layer = nn.Embedding(6, 3).double()
    (target,) = find(Host(layer), ["layer"])
    y = layer(TOKENS).detach()
    close(target.apply(TOKENS, target.weight()), y, 0)
    A, B = torch.randn(2, 6, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    close(
        target.add_low_rank(y.clone(), TOKENS, A, B, 0.5, 0.0) - y,
        0.5 * F.embedding(TOKENS, (B @ A).T),
        1e-14,
    )


def test_dropout_leaves_an_index_alone() -> None:
    model, target, table = adapted(nn.Embedding(6, 3))
    y = F.embedding(TOKENS, model.layer.weight)
    A, B = (p for n, p in model.named_parameters() if "lorakit" in n)
    close(target.add_low_rank(y.clone(), TOKENS, A, B, 2.0, 0.5), table[TOKENS], 1e-13)
