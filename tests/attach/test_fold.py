"""Folding by blocks of rows gives what folding the whole weight gives."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.attach.fold import Block, Change, WholeBlock, blocks, fold, same_changes
from lorakit.core import Shape, Target, WeightMethod
from lorakit.core.method import Tensors
from lorakit.ops import Ranges
from lorakit.targets.dense import DenseStorage
from lorakit.targets.linear import LinearTarget, TransposedLinearTarget
from lorakit.targets.slices import SliceTarget
from tests.contracts.pairs import Case, pairs
from tests.contracts.settings import SETTINGS

FOLD = sys.modules["lorakit.attach.fold"]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pairs(
    kinds=(
        "linear",
        "linear-slice-interleaved",
        "linear-slice-uneven",
        "hfconv1d",
        "hfconv1d-slice",
        "embedding",
        "conv2d",
        "conv2d-groups",
        "conv3d-groups",
        "experts",
    ),
    of=WeightMethod,
)
def test_blocks_of_one_row_give_the_whole(setting: str, kind: str) -> None:
    """Of every method at every kind of target: what `at_rows` gives is what the method does at these rows."""
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
    assert [(b.start, b.stop) for b in blocks(W, two) if isinstance(b, Block)] == [(0, 2), (4, 7), (7, 8)]


def test_rows_that_overlap_are_cut_where_the_changes_differ() -> None:
    W = torch.randn(8, 4)
    every_other = SliceTarget(target(), "1:2,3:6", Ranges.of([(1, 2), (3, 6)], 8))
    found = list(blocks(W, [change(target(rows=(0, 5))), change(every_other)]))
    assert [
        (b.start, b.stop, [(p.start, p.stop) for p in b.parts]) for b in found if isinstance(b, Block)
    ] == [
        (0, 1, [(0, 1)]),
        (1, 2, [(1, 2), (0, 1)]),
        (2, 3, [(2, 3)]),
        (3, 5, [(3, 5), (1, 3)]),
        (5, 6, [(3, 4)]),
    ]


class Reversed(WeightMethod):
    """A method that says nothing of rows."""

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        return {}

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        return {}

    def weight(self, target: Target, p: Tensors, W: Tensor) -> Tensor:
        return W.flip(-2)


def test_what_has_no_rows_in_common_is_folded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FOLD, "BLOCK_NUMBERS", 4)
    W = torch.randn(8, 4)
    (whole,) = blocks(W, [change(target(), Reversed()), change(target(rows=(0, 2)), Reversed())])
    assert isinstance(whole, WholeBlock)
    expected = W.flip(-2)
    expected[:2] += W[:2].flip(-2) - W[:2]
    assert torch.allclose(whole.merged(W, torch.float32), expected)
    transposed = TransposedLinearTarget("layer", Conv1D(4, 8), DenseStorage())
    (whole,) = blocks(W, [change(target()), change(transposed)])
    assert isinstance(whole, WholeBlock)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name not in ("full", "bitfit")])
def test_every_method_goes_through_the_rows(setting: str) -> None:
    """All but loralib's view of a grouped convolution, whose kernels mix the rows of the product."""
    method = SETTINGS[setting].method
    if not isinstance(method, WeightMethod):
        pytest.skip("it has no weight form")
    kinds = [Shape("linear", 12, 8), Shape("embedding", 8, 20), Shape("conv", 6, 36, (2,), (3, 3))]
    for shape in kinds:
        tensors = {name: torch.randn(size) for name, size in method.shapes(shape).items()}
        if isinstance(method, lk.VeRA) or isinstance(getattr(method, "inner", None), lk.VeRA):
            tensors |= {"vera_A": torch.randn(5, 40), "vera_B": torch.randn(40, 5)}
        if shape.kind != "conv" and isinstance(method, lk.LoRAC):
            continue
        if shape.kind == "conv" and isinstance(method, lk.TokenRows):
            continue
        found = method.at_rows(shape, tensors, 1, 3)
        assert (found is None) == (setting == "lora_c_view" and shape.kind == "conv")


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
