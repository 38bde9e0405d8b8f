"""Folding by blocks of rows gives what folding the whole weight gives."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.attach.fold import Block, Change, WholeBlock, blocks, fold, same_changes
from lorakit.core import WeightMethod
from lorakit.ops import Ranges
from lorakit.targets.dense import DenseStorage
from lorakit.targets.linear import LinearTarget
from lorakit.targets.slices import SliceTarget
from tests.contracts.pairs import Case, pairs

FOLD = sys.modules["lorakit.attach.fold"]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pairs(
    kinds=("linear", "hfconv1d", "hfconv1d-slice", "embedding", "conv2d-groups", "experts"),
    of=WeightMethod,
)
def test_blocks_of_one_row_give_the_whole(setting: str, kind: str) -> None:
    """Of every method at every kind of target: the rows that `along_rows` names are the rows that act."""
    case = Case(kind, training=False)
    case.attach(setting, "a")
    case.attach_partner(setting, "b")
    found = []
    kept = FOLD.BLOCK_NUMBERS
    for numbers in (1, 2**40):
        FOLD.BLOCK_NUMBERS = numbers
        try:
            lk.merge(case.model, {"a": 0.7, "b": -1.3})
        finally:
            FOLD.BLOCK_NUMBERS = kept
        found.append(weights(case.model))
        lk.unmerge(case.model)
    for name, value in found[1].items():
        assert torch.allclose(found[0][name], value, rtol=1e-12, atol=1e-12), name


def target(out: int = 8, in_: int = 4, rows: tuple[int, int] | None = None) -> LinearTarget | SliceTarget:
    whole = LinearTarget("layer", nn.Linear(in_, out, bias=False), DenseStorage())
    return whole if rows is None else SliceTarget(whole, f"{rows[0]}:{rows[1]}", Ranges.of([rows], out))


def change(
    where: LinearTarget | SliceTarget, method: WeightMethod | None = None, weight: float = 1.0
) -> Change:
    method = lk.LoRA(r=2) if method is None else method
    p = {name: torch.randn(size) for name, size in method.shapes(where.shape).items()}
    return Change(where, method, p, weight)


def test_rows_are_shared_out_without_gap_or_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FOLD, "BLOCK_NUMBERS", 12)
    W = torch.randn(8, 4)
    assert [(b.start, b.stop) for b in blocks(W, [change(target())]) if isinstance(b, Block)] == [
        (0, 3),
        (3, 6),
        (6, 8),
    ]
    two = [change(target(rows=(0, 2))), change(target(rows=(4, 8)))]
    assert [(b.start, b.stop) for b in blocks(W, two) if isinstance(b, Block)] == [(0, 2), (0, 3), (3, 4)]


def test_what_overlaps_or_has_no_rows_is_folded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FOLD, "BLOCK_NUMBERS", 4)
    W = torch.randn(8, 4)
    (whole,) = blocks(W, [change(target()), change(target(rows=(0, 2)))])
    assert isinstance(whole, WholeBlock)
    (block,) = blocks(W, [change(target(), lk.LoKr(r=2))])
    assert isinstance(block, Block)
    assert (block.start, block.stop) == (0, 8)


def test_folding_in_place_and_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FOLD, "BLOCK_NUMBERS", 8)
    W = torch.randn(8, 4).bfloat16()
    one, two = (
        change(target(rows=(2, 6)), weight=0.5),
        change(target(rows=(2, 6)), lk.DoRA(lk.LoRA(r=1)), -1.0),
    )
    wide = W.double()
    expected = wide.clone()
    lora = 8.0 * one.parameters["lora_B"].double() @ one.parameters["lora_A"].double()
    V = wide[2:6] + 16.0 * two.parameters["lora_B"].double() @ two.parameters["lora_A"].double()
    dora = two.parameters["magnitude"].double().unsqueeze(-1) * V / V.norm(dim=-1, keepdim=True)
    expected[2:6] += 0.5 * lora - (dora - wide[2:6])
    out = torch.full_like(W, float("nan"))
    kept = W.clone()
    fold(W, [one, two], out)
    assert torch.equal(W, kept)
    assert torch.allclose(out.double(), expected, rtol=2**-8, atol=1e-4)
    assert torch.equal(out[:2], W[:2])
    assert torch.equal(out[6:], W[6:])
    fold(W, [one, two], W)
    assert torch.equal(W, out)


def test_changes_are_the_same_where_the_tensors_are() -> None:
    one = change(target())
    assert same_changes([one], [one._replace(target=target())])
    assert not same_changes([one], [one._replace(weight=2.0)])
    assert not same_changes([one], [change(target())])
    assert not same_changes([one], [])
