"""Load a model that classifies images: one of transformers', or a ResNet for CIFAR from its file of weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.errors import ConfigError, ModelError
from lorakit.models.cifar_resnet import CifarResNet, load_cifar_resnet
from lorakit.models.classifier import head_of, labels_of, load_classifier
from lorakit.models.load import compute_dtype
from lorakit.models.resolve import ResolvedModel, resolve

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SETTINGS = "preprocessor_config.json"


@dataclass(frozen=True)
class ImageInput:
    """What a model wants its images to be.

    Attributes:
        size: Height and width; None where any will do.
        channels: 1 or 3.
        mean: Subtracted from each channel, of values from 0 to 1; None where nobody says.
        std: What each channel is then divided by.
    """

    size: int | None
    channels: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


@dataclass(frozen=True)
class ImageClassifier:
    """A model that tells images apart.

    Attributes:
        model: In ``eval()`` mode.
        labels: In the order of the logits; None where the file has no names for its classes.
        head: Paths of the modules that have to be trained and saved whatever the adapter is.
    """

    model: Any
    labels: tuple[str, ...] | None
    head: tuple[str, ...]


def find_image_model(name: str) -> ResolvedModel | str:
    """Where a model is: the path of a file of weights, or what `resolve` finds.

    Raises:
        ModelError: Nothing has that name.
    """
    file = Path(name).expanduser()
    if file.suffix == ".safetensors":
        if not file.is_file():
            raise ModelError(f"There is no file of weights {file}.")
        return str(file)
    return resolve(name)


def load_image_classifier(
    found: ResolvedModel | str,
    labels: Sequence[str] | None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> ImageClassifier:
    """Load a model, with a head for given labels.

    Args:
        found: From `find_image_model`.
        labels: What to tell apart, in the order of the logits; None takes the head that is there. A ResNet's file keeps
            its last layer where that has as many classes: the labels are taken to be in its order.
        dtype: As for `lorakit.models.load_model`.
        device: As there.
        revision: As there.
        seed: Of a new head.

    Raises:
        ModelError: It cannot be read, or is no classifier of images.
    """
    if isinstance(found, str):
        classes = None if labels is None else len(labels)
        network, _ = load_cifar_resnet(found, classes, seed=seed)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kept = compute_dtype(dtype, where)
        network = network.to(where) if isinstance(kept, str) else network.to(where, kept)
        return ImageClassifier(network, None if labels is None else tuple(labels), ("linear",))
    made = load_classifier(
        found,
        labels,
        task="image-classification",
        dtype=dtype,
        device=device,
        revision=revision,
        seed=seed,
    )
    return ImageClassifier(made.model, made.labels, made.head)


def image_head(model: nn.Module, classes: int) -> tuple[str, ...]:
    """The head of a model that was made elsewhere: transformers' own, else the last linear layer of the right size.

    Raises:
        ConfigError: There is no such layer.
    """
    if getattr(model, "base_model_prefix", None):
        return head_of(model)
    linear = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes
    ]
    if not linear:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer with {classes} outputs, one for each class of the data."
        )
    return (linear[-1],)


def own_labels(model: nn.Module) -> tuple[str, ...] | None:
    """The labels that a model's configuration names, if it does."""
    return labels_of(model) if hasattr(getattr(model, "config", None), "id2label") else None


def image_input(model: nn.Module) -> ImageInput:
    """What a model wants its images to be, as far as it says."""
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    channels = int(getattr(config, "num_channels", None) or 3)
    mean, std = _IMAGENET if isinstance(model, CifarResNet) else _normalisation(config)
    return ImageInput(size if isinstance(size, int) else None, channels, mean, std)


def normalisation_file(found: ResolvedModel) -> Path | None:
    """The file beside a model of transformers' that says how its images are normalised; None without one."""
    if found.path is not None:
        file = found.path / _SETTINGS
        return file if file.is_file() else None
    from transformers.utils import cached_file

    fetched = cached_file(
        found.location,
        _SETTINGS,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if fetched is None else Path(fetched)


def _normalisation(config: Any) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """From the file that transformers keeps beside a model."""
    path = Path(getattr(config, "_name_or_path", "") or ".", _SETTINGS)
    if not path.is_file():
        return None, None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return tuple(map(float, said["image_mean"])), tuple(map(float, said["image_std"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} does not say image_mean and image_std: {error}.") from error
