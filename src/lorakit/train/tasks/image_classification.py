"""Learning to tell images apart: convolutional networks and vision transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import ConfigError
from lorakit.models import ResolvedModel
from lorakit.models.image_classifier import (
    ImageClassifier,
    find_image_model,
    image_head,
    image_input,
    load_image_classifier,
    own_labels,
)
from lorakit.train.collate import Collator
from lorakit.train.images import (
    ImageRow,
    ImageSet,
    LabelledImage,
    choose_image_collator,
    class_names,
    image_rows,
    load_images,
)
from lorakit.train.loss import Objective, count_labels
from lorakit.train.progress import Progress
from lorakit.train.recipe import Recipe
from lorakit.train.results import EvalResult
from lorakit.train.row_set import Row
from lorakit.train.scoring import outputs
from lorakit.train.split import Split
from lorakit.train.task import telling
from lorakit.train.task_data import ImageData
from lorakit.train.tasks.headed import HeadedTask, label_measures, label_result

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def image_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits ``(rows, classes)`` in float32, of transformers' models and of those that return a plain tensor."""
    output = model(batch["pixel_values"].to(next(model.parameters()).dtype))
    logits: Tensor = getattr(output, "logits", output)
    return logits.float()


def summed_image_loss(model: nn.Module, base: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The sum of ``-log p`` over the images of a batch; a scalar."""
    return F.cross_entropy(image_logits(model, batch), batch["labels"], reduction="sum")


IMAGE = Objective(summed_image_loss, count_labels, "row", read=count_labels, reads="image")


class ImageClassification(HeadedTask):
    """A network with a head for the classes of the training data, and the recipe's adapter on its body.

    Running statistics of batch normalisation stay those of the base: in training, too, it normalises by them.
    """

    objective = IMAGE
    measures = ("valid_loss", "valid_accuracy")
    model_kind = "image-classification"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.data, ImageData)
        self.data = recipe.data
        self._first: Sequence[ImageRow] = ()

    def resolve(self) -> ResolvedModel | str:
        """A file of weights, or a model of transformers'."""
        return find_image_model(self.recipe.model.name)

    def tokenizer(self, resolved: ResolvedModel | str) -> None:
        """Nothing is text."""

    def _images(self, split: Split) -> list[LabelledImage]:
        path: Path | None = getattr(self.data, split)
        if path is None:
            raise ConfigError(f"The recipe names no images for the {split} split: set data.{split}.")
        return load_images(path, self.data, self.data.max_rows.get(split))

    def labels_of_data(self) -> tuple[str, ...]:
        return class_names(self._images("train"), self.data)

    def rows(self, tokenizer: Any, split: Split) -> ImageSet:
        """Images with the numbers of their classes; the training split decides what classes there are."""
        images = self._images(split)
        if split == "train":
            self.labels = class_names(images, self.data)
        made = image_rows(images, self.labels, flip=self.data.flip and split == "train")
        if split == "train":
            self._first = made.rows
        return made

    def read_model(self, resolved: ResolvedModel | str, labels: Sequence[str] | None) -> ImageClassifier:
        """A file of weights, or a model of transformers', with its head."""
        section, settings = self.recipe.model, self.recipe.train
        return load_image_classifier(
            resolved,
            labels,
            dtype=section.dtype,
            device=section.device,
            revision=section.revision,
            seed=settings.seed if settings.init_seed is None else settings.init_seed,
        )

    def accept(self, model: Any) -> None:
        """It must have a head of the right size; transformers' models get the labels' names."""
        self.head = image_head(model, len(self.labels))
        have = own_labels(model)
        if have is not None:
            self._name_outputs(model, have, "classes")

    def check_length(self, model: PreTrainedModel, rows: Sequence[Row]) -> None:
        """Images are brought to the size that the model wants."""

    def collator(self, model: Any, tokenizer: Any) -> tuple[Collator, str | None]:
        """Images of one size, normalised."""
        return choose_image_collator(image_input(model), self.data, self._first), None

    def measure(self, model: PreTrainedModel, rows: Sequence[ImageRow], collator: Any) -> dict[str, float]:
        """The loss, and the share of right classes."""
        logits = self._logits(model, rows, collator)
        return label_measures(logits, rows)

    def _logits(
        self, model: PreTrainedModel, rows: Sequence[ImageRow], collator: Collator, told: Any = None
    ) -> Tensor:
        return outputs(model, rows, collator, self.recipe.train, partial(image_logits, model), told)

    def examples(self, split: Split, limit: int | None) -> list[LabelledImage]:
        """Images with their classes."""
        return self._images(split)[:limit]

    def score(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        examples: Sequence[LabelledImage],
        progress: Progress,
        title: str,
    ) -> EvalResult:
        """Accuracy, macro F1 and loss, and how each class fared."""
        self.labels = self.labels or self._names(model, examples)
        rows = image_rows(examples, self.labels)
        progress.say(str(rows))
        collator = choose_image_collator(image_input(model), self.data, rows.rows)
        logits = self._logits(model, rows.rows, collator, telling(progress, "looking"))
        gold = [row.labels[0] for row in rows.rows]
        shown = [(image.place, image.place) for image in examples]
        return label_result(logits, gold, rows.names, self.recipe.evaluate.metrics, shown)

    def _names(self, model: Any, examples: Sequence[LabelledImage]) -> tuple[str, ...]:
        """Where no adapter names the classes: the model, else the recipe and its data."""
        return own_labels(model) or class_names(examples, self.data)
