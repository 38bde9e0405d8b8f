"""The facts of a target."""

from __future__ import annotations

import pytest
from torch import nn

from lorakit.core import Shape
from lorakit.core.target import stock_class
from lorakit.targets import find
from tests.contracts.kinds import KINDS


@pytest.mark.parametrize(
    ("shape", "numel", "text"),
    [
        (Shape("linear", out=3, in_=4), 12, "3 x 4"),
        (Shape("parameter", out=3, in_=4, batch=(8,)), 96, "8 x 3 x 4"),
        (Shape("parameter", out=3, in_=1), 3, "3 x 1"),
        (Shape("parameter", out=3, in_=4, batch=(0,)), 0, "0 x 3 x 4"),
    ],
)
def test_a_shape_counts_and_reads(shape: Shape, numel: int, text: str) -> None:
    assert shape.numel == numel
    assert str(shape) == text


def test_channels_are_columns_for_each_position_of_the_kernel() -> None:
    assert Shape("conv", out=3, in_=24, kernel=(3, 2)).channels == 4
    assert Shape("linear", out=3, in_=24).channels == 24


def test_only_an_embedding_looks_up() -> None:
    assert Shape("embedding", out=3, in_=4).lookup
    assert not Shape("linear", out=3, in_=4).lookup


# Slices, storages and places without a weight have tests of their own in tests/targets.
DENSE = [name for name, kind in KINDS.items() if kind.adapts == "layer" and not kind.part and not kind.lossy]


@pytest.mark.parametrize("kind", DENSE)
def test_the_matrix_view_loses_nothing(kind: str) -> None:
    model = KINDS[kind].build()
    (target,) = find(model, [KINDS[kind].names])
    stored = target.storage.load(target.module, target.parameter)
    matrix = target.weight()
    assert tuple(matrix.shape) == (*target.batch, target.out, target.in_)
    assert target.shape.numel == stored.numel()
    assert target.from_matrix(matrix).shape == stored.shape
    assert (target.from_matrix(matrix) == stored).all()
    assert matrix.data_ptr() == stored.data_ptr(), "a view, not a copy"
    assert not matrix.requires_grad
    assert target.path in repr(target)


@pytest.mark.parametrize("kind", DENSE)
def test_what_is_stored_is_what_weight_reads(kind: str) -> None:
    model = KINDS[kind].build()
    (target,) = find(model, [KINDS[kind].names])
    new = target.weight() * 2 + 1
    before = target.stored.detach().clone()
    value = target.replaced(target.stored.detach(), new)
    assert (target.stored == before).all(), "what is stored was not changed"
    target.storage.store(target.module, target.parameter, value)
    assert (target.weight() == new).all()
    assert target.stored.is_contiguous()


def test_the_class_of_a_layer_that_is_not_bound_is_its_own() -> None:
    assert stock_class(nn.Linear(1, 1)) is nn.Linear
