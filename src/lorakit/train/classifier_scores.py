"""How well labels are told apart: accuracy, macro F1, and each label by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LabelScore:
    """How one label fared.

    Attributes:
        name: The label.
        count: Rows that have it.
        predicted: Rows that were given it.
        correct: Rows that have it and were given it.
    """

    name: str
    count: int
    predicted: int
    correct: int

    @property
    def precision(self) -> float:
        """The share of right ones among those given it; 0 where none was."""
        return self.correct / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """The share found among those that have it; 0 where none has."""
        return self.correct / self.count if self.count else 0.0

    @property
    def f1(self) -> float:
        """``2 correct / (count + predicted)``, the harmonic mean of precision and recall; 0 where both counts are 0."""
        both = self.count + self.predicted
        return 2 * self.correct / both if both else 0.0


def label_scores(
    predicted: Sequence[int], gold: Sequence[int], names: Sequence[str]
) -> tuple[LabelScore, ...]:
    """Every label's score.

    Args:
        predicted: Number of the label given to each row.
        gold: Number of the label that each row has.
        names: The labels by number.
    """
    pairs = list(zip(predicted, gold, strict=True))
    return tuple(
        LabelScore(
            name,
            sum(g == i for _, g in pairs),
            sum(p == i for p, _ in pairs),
            sum(p == g == i for p, g in pairs),
        )
        for i, name in enumerate(names)
    )


def accuracy(scores: Sequence[LabelScore]) -> float:
    """The share of rows given the label that they have, 0 to 1."""
    return sum(s.correct for s in scores) / sum(s.count for s in scores)


def macro_f1(scores: Sequence[LabelScore]) -> float:
    """The plain mean of the labels' F1, over those that some row has or was given, as scikit-learn takes it."""
    there = [s.f1 for s in scores if s.count or s.predicted]
    return sum(there) / len(there)
