"""Using a classifier: labels for texts, and how many of them are right."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lorakit.errors import ConfigError, DataError
from lorakit.io import read
from lorakit.models import labels_of, load_classifier, load_tokenizer, resolve
from lorakit.train.classification import label_logits, labels_in
from lorakit.train.classifier_scores import accuracy, label_scores, macro_f1
from lorakit.train.collate import LabelCollator
from lorakit.train.data import Split
from lorakit.train.data_sections import LabelledData
from lorakit.train.evaluation import Answer, EvalResult
from lorakit.train.labelled import LabelledText, label_names, load_texts, tokenize
from lorakit.train.progress import Progress
from lorakit.train.quantized_base import quantize_base
from lorakit.train.recipe import Recipe, TrainSection
from lorakit.train.scoring import scored

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


def evaluate_classifier(
    recipe: Recipe,
    adapter: str | Path | None,
    split: Split,
    limit: int | None,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: Progress,
) -> EvalResult:
    """See `lorakit.train.evaluate`."""
    assert isinstance(recipe.data, LabelledData)
    texts = load_texts(recipe.data, split)[: limit or recipe.evaluate.limit]
    resolved = resolve(recipe.model.name) if model is None or tokenizer is None else None
    tokenizer = tokenizer or load_tokenizer(resolved or recipe.model.name, revision=recipe.model.revision)
    own = model is None
    if model is None:
        section = recipe.model
        labels = None if adapter is None else adapter_labels(adapter) or _labels_of_data(recipe.data, adapter)
        made = load_classifier(
            resolved or section.name,
            labels,
            dtype=section.dtype,
            device=section.device,
            revision=section.revision,
        )
        model = made.model
        quantize_base(model, recipe, made.head)
    rows = tokenize(
        texts,
        labels_of(model),
        tokenizer,
        max_length=recipe.train.max_length,
        overlong="error" if recipe.train.overlong == "error" else "truncate",
    )
    progress.say(f"{split}: {rows}")
    with scored(model, adapter, own=own):
        began = time.perf_counter()
        collator = LabelCollator(int(tokenizer.pad_token_id))
        logits = label_logits(model, rows.rows, collator, recipe.train, partial(_tell, progress))
        seconds = time.perf_counter() - began
    gold = [row.labels[0] for row in rows.rows]
    predicted = logits.argmax(dim=1).tolist()
    fared = label_scores(predicted, gold, rows.names)
    every = {
        "accuracy": accuracy(fared),
        "macro_f1": macro_f1(fared),
        "loss": F.cross_entropy(logits, torch.tensor(gold)).item(),
    }
    answers = tuple(
        Answer(text.place, _shown(text), rows.names[p], (text.label,), p == g)
        for text, p, g in zip(texts, predicted, gold, strict=True)
    )
    scores = {metric: every[metric] for metric in recipe.evaluate.metrics or every}
    return EvalResult(scores, len(texts), seconds, answers, fared)


def _labels_of_data(data: LabelledData, adapter: str | Path) -> tuple[str, ...]:
    """For an adapter that does not say its labels, such as PEFT's: those of the training data."""
    if data.train is None:
        raise ConfigError(
            f"The adapter {adapter} does not say what labels it tells apart, and data.train, which would, is not set."
        )
    return label_names(load_texts(data, "train"))


def _tell(progress: Progress, done: int, total: int) -> None:
    progress.answered(done, total, "classifying")


def _shown(text: LabelledText) -> str:
    return text.text if text.second is None else f"{text.text}\n{text.second}"
