"""What tasks have in common whose model ends in a head of its own, trained whole beside any adapter of the body."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lorakit.attach import AttachReport
from lorakit.core import Method
from lorakit.core.walk import base_parameters
from lorakit.errors import ConfigError, listing
from lorakit.io import read
from lorakit.methods import FullFineTuning
from lorakit.models import Classifier, ResolvedModel, head_of, labels_of, load_classifier
from lorakit.models.classifier import naming
from lorakit.train.classifier_scores import accuracy, label_scores, macro_f1
from lorakit.train.recipe import Recipe
from lorakit.train.results import Answer, EvalResult
from lorakit.train.task import Attachable, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorakit.models.image_classifier import ImageClassifier


class HeadedTask(Task):
    """A head over a pretrained body.

    Attributes:
        peft_task: PEFT's word for the task, where it has one.
        labels: In the order of the logits; known when the training rows are.
    """

    peft_task: ClassVar[str | None] = None

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.labels: tuple[str, ...] = ()

    def load(self, resolved: ResolvedModel | str) -> PreTrainedModel:
        """An encoder or decoder with a head; a new one is drawn from the seed of the adapter's first values."""
        return self._loaded(resolved, self.labels)

    def load_trained(self, resolved: ResolvedModel | str, adapter: str | Path | None) -> PreTrainedModel:
        """With a head for the labels that the adapter names; without an adapter the head that the checkpoint has."""
        labels = None if adapter is None else self.labels_of_adapter(adapter)
        return self._loaded(resolved, labels)

    def labels_of_adapter(self, adapter: str | Path) -> tuple[str, ...]:
        """What a saved adapter tells apart; an adapter that does not say, such as PEFT's, takes the training data's."""
        named = read(adapter).spec.info.get("labels")
        if isinstance(named, list):
            return tuple(map(str, named))
        if not self.has_split("train"):
            raise ConfigError(
                f"The adapter {adapter} does not say what labels it tells apart, and data.train, which would, "
                "is not set."
            )
        return self.labels_of_data()

    def labels_of_data(self) -> tuple[str, ...]:
        """The labels of the training data."""
        raise NotImplementedError

    def _loaded(self, resolved: ResolvedModel | str, labels: Sequence[str] | None) -> PreTrainedModel:
        made = self.read_model(resolved, labels)
        self.head, self.labels = made.head, made.labels or ()
        return made.model

    def read_model(
        self, resolved: ResolvedModel | str, labels: Sequence[str] | None
    ) -> Classifier | ImageClassifier:
        """The model with its head."""
        section, settings = self.recipe.model, self.recipe.train
        return load_classifier(
            resolved,
            labels,
            task=self.model_kind,
            dtype=section.dtype,
            device=section.device,
            revision=section.revision,
            seed=settings.seed_of("init"),
        )

    def accept(self, model: PreTrainedModel) -> None:
        """It must have a head of the right size, which gets the labels' names."""
        self.head = head_of(model)
        self._name_outputs(model, labels_of(model), "labels")

    def _name_outputs(self, model: Any, have: Sequence[str], what: str) -> None:
        """Give the model the names of the training data's labels, in place of as many others."""
        if len(have) != len(self.labels):
            raise ConfigError(
                f"The model has a head for {len(have)} {what}; the training data has {len(self.labels)}: "
                f"{listing(self.labels, most=20)}."
            )
        for key, value in naming(self.labels).items():
            setattr(model.config, key, value)

    def adapter(self, model: PreTrainedModel) -> Attachable:
        """The recipe's adapter on the body, and the whole head beside it."""
        section = self.recipe.adapter
        chosen: Method | Mapping[Any, Method] = section.adapter()
        if isinstance(chosen, Method):
            chosen = {_key(chosen.default_targets if section.targets is None else section.targets): chosen}
        head = re.compile(f"({'|'.join(map(re.escape, self.head))})\\..*")
        return {**chosen, head: FullFineTuning()}, None

    def check(self, model: PreTrainedModel, report: AttachReport) -> None:
        """The whole head must be trained."""
        trained = {site.path for site in report.sites if site.method == FullFineTuning.name}
        left = [name for name in self._head_parameters(model) if name not in trained]
        if left:
            raise ConfigError(
                f"adapter.exclude leaves out {left[0]}, a part of the head, which would stay random: exclude layers of "
                "the body only."
            )

    def _head_parameters(self, model: PreTrainedModel) -> Iterator[str]:
        for name, _ in base_parameters(model):
            if any(name.startswith(f"{path}.") for path in self.head):
                yield name

    def info(self) -> Mapping[str, Any]:
        """The labels, in the order of the logits; the task in PEFT's word for it."""
        return headed_info(self.recipe.task, self.labels, self.peft_task)


def headed_info(task: str, labels: Sequence[str], peft_task: str | None) -> dict[str, Any]:
    """What an adapter with a head says about itself, in `AdapterSpec.info`."""
    return {
        "task": task,
        "labels": list(labels),
        **({} if peft_task is None else {"peft": {"task_type": peft_task}}),
    }


def label_measures(logits: torch.Tensor, rows: Sequence[Any]) -> dict[str, float]:
    """The loss and the share of right labels of some rows, from their logits ``(rows, labels)``."""
    gold = torch.tensor([row.labels[0] for row in rows])
    return {
        "valid_loss": torch.nn.functional.cross_entropy(logits, gold).item(),
        "valid_accuracy": (logits.argmax(dim=1) == gold).float().mean().item(),
    }


def label_result(
    logits: torch.Tensor,
    gold: Sequence[int],
    names: Sequence[str],
    metrics: Sequence[str] | None,
    shown: Sequence[tuple[str, str]],
) -> EvalResult:
    """Accuracy, macro F1 and loss of labels, what each row was given, and how each label fared.

    Args:
        logits: ``(rows, labels)``.
        gold: The number of each row's label.
        names: The labels.
        metrics: Which of the scores; None for all.
        shown: What each row is called, and what it shows to people.
    """
    predicted = logits.argmax(dim=1).tolist()
    fared = label_scores(predicted, gold, names)
    every = {
        "accuracy": accuracy(fared),
        "macro_f1": macro_f1(fared),
        "loss": torch.nn.functional.cross_entropy(logits, torch.tensor(gold)).item(),
    }
    answers = tuple(
        Answer(place, text, names[p], (names[g],), p == g)
        for (place, text), p, g in zip(shown, predicted, gold, strict=True)
    )
    scores = {metric: every[metric] for metric in metrics or every}
    return EvalResult(scores, len(gold), 0.0, answers, fared)


def _key(targets: str | Sequence[str]) -> str | tuple[str, ...] | re.Pattern[str]:
    """A choice of targets as a key of a mapping of methods."""
    if not isinstance(targets, str):
        return tuple(targets)
    return targets if targets.startswith("all-") else re.compile(targets)
