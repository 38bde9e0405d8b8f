"""Places of a dimension as ranges, held against index tensors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lorakit.errors import ConfigError
from lorakit.ops import Ranges

CASES = {
    "one": [(2, 5)],
    "all": [(0, 12)],
    "even": [(0, 2), (4, 6), (8, 10)],
    "even-inside": [(2, 3), (8, 9)],
    "uneven": [(0, 1), (3, 7), (11, 12)],
    "unordered": [(8, 10), (0, 2), (2, 4)],
}
cases = pytest.mark.parametrize("spans", CASES.values(), ids=list(CASES))
dims = pytest.mark.parametrize("dim", [-1, -2])


def index(spans: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor(sorted(i for a, b in spans for i in range(a, b)))


@dims
@cases
def test_take_and_put_are_those_of_an_index(spans: list[tuple[int, int]], dim: int) -> None:
    ranges = Ranges.of(spans, 12)
    t = torch.randn(12, 12)
    part = ranges.take(t, dim)
    assert torch.equal(part, t.index_select(dim, index(spans)))
    assert len(ranges) == part.shape[dim]
    new = torch.randn_like(part)
    kept = t.clone()
    expected = t.index_copy(dim, index(spans), new)
    assert torch.equal(ranges.put(t, new, dim), expected)
    assert torch.equal(t, kept)
    ranges.put_(t, new, dim)
    assert torch.equal(t, expected)


@cases
def test_gradients(spans: list[tuple[int, int]]) -> None:
    ranges = Ranges.of(spans, 12)
    t = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    part = torch.randn(3, len(ranges), dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda a, b: ranges.put(a * 2, b, -1), (t, part))
    torch.autograd.gradcheck(lambda a: ranges.take(a * 2, -1), (t,))


@cases
def test_a_vector_has_them_in_its_only_dimension(spans: list[tuple[int, int]]) -> None:
    ranges = Ranges.of(spans, 12)
    t = torch.randn(12)
    assert torch.equal(ranges.take(t, -1), t[index(spans)])
    assert torch.equal(ranges.put(torch.zeros(12), ranges.take(t, -1), -1)[index(spans)], t[index(spans)])


def test_neighbours_are_joined_and_one_range_is_a_view() -> None:
    ranges = Ranges.of([(4, 6), (2, 4)], 8)
    assert ranges.spans == ((2, 6),)
    assert str(ranges) == "2:6"
    t = torch.randn(5, 8)
    part = ranges.take(t, -1)
    assert ranges.is_taken_from(t, part, -1)
    assert not ranges.is_taken_from(t, part.clone(), -1)
    part.zero_()
    assert torch.equal(t[:, 2:6], torch.zeros(5, 4))


def test_overlaps() -> None:
    first = Ranges.of([(0, 2), (6, 8)], 8)
    assert first.overlaps(Ranges.of([(1, 4)], 8))
    assert not first.overlaps(Ranges.of([(2, 6)], 8))


@pytest.mark.parametrize("spans", [[], [(3, 3)], [(4, 2)], [(0, 9)], [(0, 3), (2, 4)]])
def test_what_makes_no_sense_is_refused(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(ConfigError):
        Ranges.of(spans, 8)


def test_copies_are_equal() -> None:
    ranges = Ranges.of(CASES["even"], 12)
    for twin in (copy.deepcopy(ranges), pickle.loads(pickle.dumps(ranges))):
        assert twin == ranges
        assert torch.equal(twin.take(torch.arange(12), -1), ranges.take(torch.arange(12), -1))
