"""Using a classifier: labels for texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import DataError
from lorakit.io import read
from lorakit.models import labels_of
from lorakit.train.collate import LabelCollator
from lorakit.train.labelled import LabelledText, tokenize
from lorakit.train.recipe import TrainSection
from lorakit.train.tasks.classification import label_logits, labels_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prediction:
    """What a classifier says about a text.

    Attributes:
        label: The likeliest label.
        probability: Its probability.
        probabilities: Every label's.
    """

    label: str
    probability: float
    probabilities: dict[str, float]


def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | tuple[str, str]],
    *,
    max_length: int = 1024,
    batch_rows: int = 16,
) -> list[Prediction]:
    """The label of each text, with whatever adapters act.

    Args:
        model: A classifier whose configuration names its labels.
        tokenizer: Its tokenizer.
        texts: Each a text, or a pair of texts where the classifier was trained on pairs.
        max_length: Most tokens that are read; the end of a longer text is cut off.
        batch_rows: Texts read at a time.

    Raises:
        DataError: There are no texts.
    """
    if not texts:
        raise DataError("There is nothing to classify: texts is empty.")
    names = labels_of(model)
    pairs = [(text, None) if isinstance(text, str) else text for text in texts]
    asked = [LabelledText(f"text {i}", one, two, names[0]) for i, (one, two) in enumerate(pairs)]
    rows = tokenize(asked, names, tokenizer, max_length=max_length).rows
    settings = TrainSection(batch_rows=batch_rows)
    logits = label_logits(model, rows, LabelCollator(int(tokenizer.pad_token_id)), settings)
    found = []
    for row in logits.softmax(dim=1).tolist():
        each = dict(zip(names, row, strict=True))
        best = max(names, key=each.__getitem__)
        found.append(Prediction(best, each[best], each))
    return found


def adapter_labels(adapter: str | Path) -> tuple[str, ...] | None:
    """The labels that a saved adapter tells apart, or None when it is no classifier's.

    Raises:
        AdapterFileError: It cannot be read.
    """
    return labels_in(read(adapter).spec.info)
