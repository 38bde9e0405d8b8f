"""Learning to tell texts apart: a fresh head over a pretrained body."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorakit.train.collate import Collator, LabelCollator
from lorakit.train.cutting import Overlong
from lorakit.train.data import Split
from lorakit.train.data_sections import LabelledData
from lorakit.train.labelled import (
    LabelledRow,
    LabelledSet,
    LabelledText,
    label_names,
    load_texts,
    tokenize,
)
from lorakit.train.loss import LABEL, without
from lorakit.train.progress import Progress
from lorakit.train.recipe import TrainSection
from lorakit.train.results import EvalResult
from lorakit.train.scoring import outputs
from lorakit.train.strands import Strand, token_strand
from lorakit.train.task import telling
from lorakit.train.tasks.headed import HeadedTask, label_measures, label_result

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Classification(HeadedTask):
    """A head for the labels of the training data, and the recipe's adapter on the body."""

    objective = LABEL
    measures = ("valid_loss", "valid_accuracy")
    model_kind = "sequence-classification"
    peft_task = "SEQ_CLS"

    def rows(self, tokenizer: PreTrainedTokenizerBase, split: Split) -> LabelledSet:
        """Texts with the numbers of their labels; the training split decides what labels there are."""
        settings = self.recipe.train
        texts = load_texts(self._data, split)
        if split == "train":
            self.labels = label_names(texts)
        overlong = settings.overlong if split == "train" else "truncate"
        return tokenize(texts, self.labels, tokenizer, max_length=settings.max_length, overlong=overlong)

    @property
    def _data(self) -> LabelledData:
        assert isinstance(self.recipe.data, LabelledData)
        return self.recipe.data

    def labels_of_data(self) -> tuple[str, ...]:
        return label_names(load_texts(self._data, "train"))

    def collator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, str | None]:
        """Padded on the right, as decoders need that classify at the last token of the text."""
        return LabelCollator(int(tokenizer.pad_token_id)), None

    def strands(self, tokenizer: PreTrainedTokenizerBase, row: LabelledRow) -> Sequence[Strand]:
        """The text, with the name of its label."""
        return [replace(token_strand(row), note=f"label {self.labels[row.labels[0]]}")]

    def measure(self, model: PreTrainedModel, rows: Sequence[LabelledRow], collator: Any) -> dict[str, float]:
        """The loss, and the share of right labels."""
        logits = label_logits(model, rows, collator, self.recipe.train)
        return label_measures(logits, rows)

    def examples(self, split: Split, limit: int | None) -> list[LabelledText]:
        """Texts with the labels that they have."""
        return load_texts(self._data, split)[:limit]

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[LabelledText],
        progress: Progress,
        title: str,
    ) -> EvalResult:
        """Accuracy, macro F1 and loss, and how each label fared."""
        from lorakit.models import labels_of

        settings = self.recipe.train
        overlong: Overlong = "error" if settings.overlong == "error" else "truncate"
        rows = tokenize(
            examples, labels_of(model), tokenizer, max_length=settings.max_length, overlong=overlong
        )
        progress.say(str(rows))
        collator = LabelCollator(int(tokenizer.pad_token_id))
        logits = label_logits(model, rows.rows, collator, settings, telling(progress, "classifying"))
        shown = [(text.place, text.shown) for text in examples]
        gold = [row.labels[0] for row in rows.rows]
        return label_result(logits, gold, rows.names, self.recipe.evaluate.metrics, shown)


def labels_in(info: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels that an adapter was trained to tell apart, or None when it is no classifier's."""
    labels = info.get("labels") if info.get("task") == "classification" else None
    return tuple(map(str, labels)) if isinstance(labels, list) else None


def label_logits(
    model: PreTrainedModel,
    rows: Sequence[Any],
    collator: Collator,
    settings: TrainSection,
    told: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The logits ``(rows, labels)`` in float32 on the CPU; the model's train/eval mode is put back.

    Args:
        model: A classifier, with whatever adapters act.
        rows: What to classify.
        collator: Makes the batches.
        settings: For the size of the batches.
        told: Called with the rows done and their number.
    """

    def logits(batch: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = model(**without(batch, "labels")).logits
        return found.float()

    return outputs(model, rows, collator, settings, logits, told)
