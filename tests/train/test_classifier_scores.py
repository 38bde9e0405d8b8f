"""Accuracy and F1 by hand."""

from __future__ import annotations

import pytest

from lorakit.train.classifier_scores import accuracy, label_scores, macro_f1

GOLD = [0, 0, 0, 1, 1, 2]
GIVEN = [0, 0, 1, 1, 0, 1]


def test_counts_precision_recall_and_f1() -> None:
    a, b, c, d = scores = label_scores(GIVEN, GOLD, ("a", "b", "c", "d"))
    assert [(s.count, s.predicted, s.correct) for s in scores] == [(3, 3, 2), (2, 3, 1), (1, 0, 0), (0, 0, 0)]
    assert (a.precision, a.recall, a.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert (b.precision, b.recall, b.f1) == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert (c.precision, c.recall, c.f1) == (d.precision, d.recall, d.f1) == (0, 0, 0)
    assert accuracy(scores) == 3 / 6
    # 'd' neither occurs nor is given: it does not count, as with scikit-learn's labels present in gold or given.
    assert macro_f1(scores) == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)


def test_all_right() -> None:
    scores = label_scores(GOLD, GOLD, ("a", "b", "c"))
    assert accuracy(scores) == macro_f1(scores) == 1
