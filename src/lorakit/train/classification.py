"""Learning to tell labels apart: a fresh head over a pretrained body, trained whole beside any adapter of the body."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.attach import AttachReport
from lorakit.core import Method
from lorakit.core.walk import base_parameters
from lorakit.errors import ConfigError, listing
from lorakit.methods import FullFineTuning
from lorakit.models import ResolvedModel, head_of, labels_of, load_classifier
from lorakit.models.classifier import naming
from lorakit.train.collate import Collator, LabelCollator
from lorakit.train.data import Split
from lorakit.train.data_sections import LabelledData
from lorakit.train.labelled import LabelledRow, LabelledSet, label_names, load_texts, tokenize
from lorakit.train.loss import LABEL
from lorakit.train.recipe import Recipe, Targets, TrainSection
from lorakit.train.scoring import run_batches
from lorakit.train.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Classification(Task):
    """A head for the labels of the training data, and the recipe's adapter on the body."""

    objective = LABEL

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.labels: tuple[str, ...] = ()

    def rows(self, tokenizer: PreTrainedTokenizerBase, split: Split) -> LabelledSet:
        """Texts with the numbers of their labels; the training split decides what labels there are."""
        settings, data = self.recipe.train, self.recipe.data
        assert isinstance(data, LabelledData)
        texts = load_texts(data, split)
        if split == "train":
            self.labels = label_names(texts)
        overlong = settings.overlong if split == "train" else "truncate"
        return tokenize(texts, self.labels, tokenizer, max_length=settings.max_length, overlong=overlong)

    def load(self, resolved: ResolvedModel | str) -> PreTrainedModel:
        """An encoder or decoder with a head; a new one is drawn from the seed of the adapter's first values."""
        section, settings = self.recipe.model, self.recipe.train
        made = load_classifier(
            resolved,
            self.labels,
            dtype=section.dtype,
            device=section.device,
            revision=section.revision,
            seed=settings.seed if settings.init_seed is None else settings.init_seed,
        )
        self.head = made.head
        return made.model

    def accept(self, model: PreTrainedModel) -> None:
        """It must have a head of the right size, which gets the labels' names."""
        self.head = head_of(model)
        have = labels_of(model)
        if len(have) != len(self.labels):
            raise ConfigError(
                f"The model has a head for {len(have)} labels; the training data has {len(self.labels)}: "
                f"{listing(self.labels, most=20)}."
            )
        for key, value in naming(self.labels).items():
            setattr(model.config, key, value)

    def collator(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, str | None]:
        """Padded on the right, as decoders need that classify at the last token of the text."""
        return LabelCollator(int(tokenizer.pad_token_id)), None

    def adapter(self, model: PreTrainedModel) -> tuple[Method | Mapping[Any, Method], Targets | None]:
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
        return classifier_info(self.labels)

    def measure(self, model: PreTrainedModel, rows: Sequence[LabelledRow], collator: Any) -> dict[str, float]:
        """The loss, and the share of right labels."""
        logits = label_logits(model, rows, collator, self.recipe.train)
        gold = torch.tensor([row.labels[0] for row in rows])
        return {
            "valid_loss": F.cross_entropy(logits, gold).item(),
            "valid_accuracy": (logits.argmax(dim=1) == gold).float().mean().item(),
        }


def classifier_info(labels: Sequence[str]) -> dict[str, Any]:
    """What a classifier's adapter says about itself, in `AdapterSpec.info`."""
    return {"task": "classification", "labels": list(labels), "peft": {"task_type": "SEQ_CLS"}}


def labels_in(info: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The labels that an adapter was trained to tell apart, or None when it is no classifier's."""
    labels = info.get("labels") if info.get("task") == "classification" else None
    return tuple(map(str, labels)) if isinstance(labels, list) else None


def label_logits(
    model: PreTrainedModel,
    rows: Sequence[LabelledRow],
    collator: LabelCollator,
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
    found: dict[int, Tensor] = {}

    def answer(numbers: list[int], batch: Mapping[str, Tensor]) -> None:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        found.update(zip(numbers, model(**inputs).logits.float().cpu(), strict=True))

    run_batches(model, rows, collator, settings, answer, padded=True, told=told)
    return torch.stack([found[i] for i in range(len(rows))])


def _key(targets: str | Sequence[str]) -> str | tuple[str, ...] | re.Pattern[str]:
    """A choice of targets as a key of a mapping of methods."""
    if not isinstance(targets, str):
        return tuple(targets)
    return targets if targets.startswith("all-") else re.compile(targets)
