"""The splits of a recipe's data, and what each of them names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lorakit.errors import ConfigError
from lorakit.train.data_sections import DataSection
from lorakit.train.data_source import HubSplit

Split = Literal["train", "valid", "test"]


def source_of(data: DataSection, split: Split) -> Path | HubSplit:
    """What a split is read from.

    Raises:
        ConfigError: The recipe names nothing.
    """
    source: Path | HubSplit | None = getattr(data, split)  # every section but the built-in one has them
    if source is None:
        raise ConfigError(f"The recipe names no file for the {split} split: set data.{split}.")
    return source


def has_split(data: DataSection, split: Split) -> bool:
    """Whether the recipe names examples for a split."""
    return bool(getattr(data, split))
