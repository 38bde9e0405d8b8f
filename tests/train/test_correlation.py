"""Correlations against numpy, and worked by hand."""

from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.train.correlation import pearson, ranks, spearman


def test_by_hand() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert math.isnan(pearson([1, 1], [1, 2]))


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=30))
def test_pearson_is_numpys_and_spearman_is_pearson_of_ranks(pairs: list[tuple[int, int]]) -> None:
    one, other = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    if len(set(one)) > 1 and len(set(other)) > 1:
        assert pearson(one, other) == pytest.approx(numpy.corrcoef(one, other)[0, 1], abs=1e-9)
        monotonic = [value**3 + value for value in one]
        assert spearman(one, other) == pytest.approx(spearman(monotonic, other), abs=1e-12)
