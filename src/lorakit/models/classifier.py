"""Load a base model with a classification head for given labels, and say which part of it is the head."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.errors import ModelError, listing
from lorakit.models.load import Task, origin, read_model, resolved_name
from lorakit.models.resolve import ResolvedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Classifier:
    """A model that tells labels apart.

    Attributes:
        model: In ``eval()`` mode; its ``config.id2label`` holds the labels.
        labels: In the order of the logits.
        head: Paths of the modules that are not pretrained: what has to be trained and saved whatever the adapter is.
        fresh: Whether the head is new, drawn from the seed, rather than the checkpoint's.
    """

    model: PreTrainedModel
    labels: tuple[str, ...]
    head: tuple[str, ...]
    fresh: bool


def load_classifier(
    name: str | Path | ResolvedModel,
    labels: Sequence[str] | None = None,
    *,
    task: Task = "sequence-classification",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> Classifier:
    """Load any encoder or decoder as a classifier.

    A checkpoint that is a classifier for exactly these labels keeps its head; any other gets a new one.

    Args:
        name: As for `load_model`.
        labels: What to tell apart, in the order of the logits; None takes the head that the checkpoint has. A single
            one is a number to be found, by regression.
        task: What is labelled: a text (``"sequence-classification"``), each of its tokens, or an image.
        dtype: As for `load_model`.
        device: As for `load_model`.
        revision: As for `load_model`.
        seed: Of a new head; torch's own random state is left alone.

    Raises:
        ModelError: The model cannot be found or read, has no head of its own where none is asked for, or its class has
            no classification head.
    """
    resolved = resolved_name(name, revision)
    options: dict[str, Any] = {}
    if labels is not None:
        options = {**naming(labels), "num_labels": len(labels), "ignore_mismatched_sizes": True}
        if len(labels) == 1:
            options["problem_type"] = "regression"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, fresh = read_model(resolved, task, dtype, device, revision, options)
        head = head_of(model, fresh)
        new = any(_inside(key, head) for key in fresh)
        if labels is not None and not new and tuple(labels) != _own_labels(resolved, revision):
            _draw_again(model, head)
            new = True
    if labels is None:
        if new:
            raise ModelError(
                f"{resolved.name!r} has no classification head of its own: {listing(sorted(fresh), most=4)} would be "
                "random numbers. Train one (task: classification), or name a model that was saved with its head."
            )
        labels = labels_of(model)
    return Classifier(model, tuple(labels), head, new)


def head_of(model: PreTrainedModel, fresh: Collection[str] = ()) -> tuple[str, ...]:
    """Paths of the modules outside the pretrained body, and of modules inside it whose values are new.

    Args:
        model: Of a ``...ForSequenceClassification`` class, or of those for tokens or images.
        fresh: Names of parameters that the checkpoint did not hold, such as those of BERT's pooler.

    Raises:
        ModelError: The class has no such head.
    """
    body = model.base_model_prefix
    outside = [
        path
        for path, module in model.named_children()
        if path not in (body, "lorakit") and next(module.parameters(), None) is not None
    ]
    if not outside or not hasattr(model, body):
        raise ModelError(f"{type(model).__name__} has no classification head beside its body {body!r}.")
    inside = dict.fromkeys(key.rpartition(".")[0] for key in sorted(fresh) if key.startswith(f"{body}."))
    return (*outside, *inside)


def labels_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The labels that a classifier's configuration names, in the order of its logits."""
    named: Mapping[int, str] = model.config.id2label
    return tuple(str(named[i]) for i in sorted(named))


def naming(labels: Sequence[str]) -> dict[str, dict[Any, Any]]:
    """Labels as a model's configuration holds them."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def _own_labels(resolved: ResolvedModel, revision: str | None) -> tuple[str, ...]:
    """The labels that the checkpoint's configuration names; for a model without a head they mean nothing."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resolved.location, **origin(resolved, revision))
    named = getattr(config, "id2label", None) or {}
    return tuple(str(named[i]) for i in sorted(named))


def _inside(key: str, paths: Sequence[str]) -> bool:
    return any(key.startswith(f"{path}.") for path in paths)


def _draw_again(model: PreTrainedModel, head: Sequence[str]) -> None:
    """Give the head new values, as transformers draws those that a checkpoint lacks."""
    for path in head:
        for module in model.get_submodule(path).modules():
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False
            module._is_hf_initialized = False
            model._init_weights(module)
