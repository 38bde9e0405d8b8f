"""What scoring finds: the scores of a split, and each answer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lorakit.train.classifier_scores import LabelScore


@dataclass(frozen=True)
class Answer:
    """One answer and what became of it.

    Attributes:
        id: The example's.
        prompt: What the user asked.
        answer: What the model wrote.
        references: What would have been right.
        correct: Whether it counts as right, where the metric says so for single answers.
        error: Why a query did not run.
    """

    id: str
    prompt: str
    answer: str
    references: tuple[str, ...]
    correct: bool | None = None
    error: str = ""


@dataclass(frozen=True)
class EvalResult:
    """Scores of one model on one split.

    Attributes:
        scores: Metric to value: ``execution_accuracy``, ``failed_to_run`` (the share of queries that SQLite refuses)
            and ``exact_match`` from 0 to 1, ``bleu`` from 0 to 100, ``nist`` and ``nist_row_lengths`` (see
            `lorakit.train.scores.nist`), ``loss`` in nats a token and ``perplexity``. Of a classifier ``accuracy`` and
            ``macro_f1`` from 0 to 1, and ``loss`` in nats a row. Other tasks' metrics are told in their own modules,
            under `lorakit.train.tasks`.
        count: Examples scored.
        seconds: Spent, without loading.
        answers: What was written, if anything had to be; of a classifier the label that each text was given.
        labels: Of a classifier, how each label fared.
    """

    scores: dict[str, float]
    count: int
    seconds: float
    answers: tuple[Answer, ...] = ()
    labels: tuple[LabelScore, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it, without the answers."""
        plain = {"scores": self.scores, "count": self.count, "seconds": round(self.seconds, 3)}
        if self.labels:
            plain["labels"] = [
                {**dataclasses.asdict(s), "precision": s.precision, "recall": s.recall, "f1": s.f1}
                for s in self.labels
            ]
        return plain
