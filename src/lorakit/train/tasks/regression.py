"""Learning to give a text, or a pair of texts, a number: a fresh head of one output over a pretrained body."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.models import Classifier, ResolvedModel
from lorakit.train.collate import Collator, LabelCollator
from lorakit.train.columns import column_number
from lorakit.train.correlation import pearson, spearman
from lorakit.train.cutting import Overlong, PlainText, cut_texts
from lorakit.train.data import Split
from lorakit.train.data_sections import LabelledData
from lorakit.train.labelled import LabelledRow, table_texts
from lorakit.train.loss import Objective, count_labels, without
from lorakit.train.progress import Progress
from lorakit.train.recipe import Recipe
from lorakit.train.results import Answer, EvalResult
from lorakit.train.row_set import RowSet
from lorakit.train.task import telling
from lorakit.train.tasks.classification import label_logits
from lorakit.train.tasks.headed import HeadedTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OUTPUT = ("value",)
"""What the one output of the head is called."""


@dataclass(frozen=True)
class MeasuredText(PlainText):
    """One row of a table.

    Attributes:
        value: Its number.
    """

    value: float


@dataclass(frozen=True, kw_only=True)
class MeasuredSet(RowSet[LabelledRow]):
    """All rows of a split."""

    @property
    def taught(self) -> str:
        """The range of the numbers."""
        values = [row.labels[0] for row in self.rows]
        return f"numbers from {min(values):g} to {max(values):g}"


def squared_errors(
    model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The squared error of each row of a batch, and the rows' numbers, both ``(rows,)``."""
    given = model(**without(batch, "labels")).logits.float().squeeze(1)
    return (given - batch["labels"]).square(), torch.arange(len(given), device=given.device)


SQUARED_ERROR = Objective.from_each(squared_errors, count_labels, "row")


def start_head_at(classifier: Classifier, value: float) -> None:
    """Let a head of one output give about this value to every text; one without a bias stays as it is."""
    for path in classifier.head:
        for module in classifier.model.get_submodule(path).modules():
            if isinstance(module, nn.Linear) and module.out_features == 1 and module.bias is not None:
                nn.init.constant_(module.bias, value)


class Regression(HeadedTask):
    """A head of one output, and the recipe's adapter on the body; what is minimised is the mean squared error.

    A new head starts at the mean of the training numbers: the first loss is about their variance, and no step is spent
    on finding out what size they have.
    """

    objective = SQUARED_ERROR
    measures = ("valid_loss", "valid_spearman")
    model_kind = "sequence-classification"
    peft_task = "SEQ_CLS"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._mean: float | None = None

    def _texts(self, split: Split) -> list[MeasuredText]:
        data = self.recipe.data
        assert isinstance(data, LabelledData)
        return [
            MeasuredText(text.place, text.text, text.second, column_number(row, data.label, "label", place))
            for text, (place, row) in table_texts(data, split)
        ]

    def _rows(self, texts: Sequence[MeasuredText], tokenizer: Any, overlong: Overlong) -> MeasuredSet:
        cut = cut_texts(texts, tokenizer, max_length=self.recipe.train.max_length, overlong=overlong)
        rows = tuple(
            LabelledRow(text.place, encoded.ids, (text.value,), encoded.types) for text, encoded in cut.kept
        )
        return MeasuredSet(rows=rows, longest=cut.longest, truncated=cut.truncated, dropped=cut.dropped)

    def rows(self, tokenizer: PreTrainedTokenizerBase, split: Split) -> MeasuredSet:
        """Texts with their numbers."""
        self.labels = OUTPUT
        overlong = self.recipe.train.overlong if split == "train" else "truncate"
        made = self._rows(self._texts(split), tokenizer, overlong)
        if split == "train":
            self._mean = math.fsum(row.labels[0] for row in made.rows) / len(made.rows)
        return made

    def labels_of_data(self) -> tuple[str, ...]:
        return OUTPUT

    def read_model(self, resolved: ResolvedModel | str, labels: Sequence[str] | None) -> Classifier:
        """The model with its head; to train, a new one starts at the mean of the training numbers."""
        made = super().read_model(resolved, labels)
        assert isinstance(made, Classifier)
        if made.fresh and self._mean is not None:
            start_head_at(made, self._mean)
        return made

    def accept(self, model: PreTrainedModel) -> None:
        """Its head must have one output."""
        super().accept(model)
        model.config.problem_type = "regression"

    def collator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, str | None]:
        """Padded on the right."""
        return LabelCollator(int(tokenizer.pad_token_id)), None

    def measure(self, model: PreTrainedModel, rows: Sequence[LabelledRow], collator: Any) -> dict[str, float]:
        """The mean squared error, and how well the order is found."""
        given = label_logits(model, rows, collator, self.recipe.train).squeeze(1)
        gold = torch.tensor([float(row.labels[0]) for row in rows])
        return {
            "valid_loss": F.mse_loss(given, gold).item(),
            "valid_spearman": spearman(given.tolist(), gold.tolist()),
        }

    def examples(self, split: Split, limit: int | None) -> list[MeasuredText]:
        """Texts with their numbers."""
        return self._texts(split)[:limit]

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[MeasuredText],
        progress: Progress,
        title: str,
    ) -> EvalResult:
        """``pearson`` and ``spearman`` from -1 to 1, ``mean_squared_error`` and ``mean_absolute_error``."""
        settings = self.recipe.train
        rows = self._rows(examples, tokenizer, "error" if settings.overlong == "error" else "truncate").rows
        collator = LabelCollator(int(tokenizer.pad_token_id))
        given = label_logits(model, rows, collator, settings, telling(progress, "reading")).squeeze(1)
        gold = torch.tensor([text.value for text in examples])
        every = {
            "pearson": pearson(given.tolist(), gold.tolist()),
            "spearman": spearman(given.tolist(), gold.tolist()),
            "mean_squared_error": F.mse_loss(given, gold).item(),
            "mean_absolute_error": F.l1_loss(given, gold).item(),
        }
        answers = tuple(
            Answer(text.place, text.shown, f"{value:.4g}", (f"{text.value:g}",))
            for text, value in zip(examples, given.tolist(), strict=True)
        )
        scores = {metric: every[metric] for metric in self.recipe.evaluate.metrics or every}
        return EvalResult(scores, len(examples), 0.0, answers)
