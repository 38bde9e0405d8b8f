"""Entities from tags."""

from __future__ import annotations

import pytest

from lorakit.train.entities import entities, entity_scores


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-x I-x O", [("x", 1, 3)]),
        ("B-x B-x", [("x", 0, 1), ("x", 1, 2)]),
        ("I-x I-x B-y", [("x", 0, 2), ("y", 2, 3)]),
        ("B-x I-y I-y", [("x", 0, 1), ("y", 1, 3)]),
        ("O O", []),
        ("B-a-b I-a-b", [("a-b", 0, 2)]),
    ],
)
def test_entities(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def test_scores_count_kind_and_both_borders() -> None:
    gold = [["B-x", "I-x", "O", "B-y"], ["B-x"]]
    given = [["B-x", "O", "O", "B-y"], ["B-y"]]
    score = entity_scores(given, gold)
    assert (score.count, score.predicted, score.correct) == (3, 3, 1)
    assert score.f1 == pytest.approx(1 / 3)
    assert entity_scores(gold, gold).f1 == 1.0
