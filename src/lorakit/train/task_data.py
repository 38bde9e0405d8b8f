"""The section ``data`` of tasks that are not about conversations: tagged words, pairs of texts, images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lorakit.errors import ConfigError
from lorakit.train.data_sections import MAX_ROWS, TABLE_FORMAT, DataSection, TableFormat, check_splits
from lorakit.train.data_source import DataSource
from lorakit.train.sections import InputPath


class TaggedData(DataSection):
    """``task: token-classification``: rows of words and of their tags."""

    train: DataSource | None = Field(default=None, description="What to train on; its tags are learnt.")
    valid: DataSource | None = Field(default=None, description="Of loss and accuracy during training.")
    test: DataSource | None = Field(default=None, description="To score.")
    format: TableFormat = Field(default="auto", description=TABLE_FORMAT)
    tokens: str = Field(default="tokens", description="Name of the column with the list of words.")
    tags: str = Field(
        default="tags", description="Name of the column with the list of tags, a word or a whole number each."
    )
    max_rows: dict[Literal["train", "valid", "test"], int] = Field(default_factory=dict, description=MAX_ROWS)

    @model_validator(mode="after")
    def _check(self) -> TaggedData:
        check_splits(self)
        return self


class PairData(DataSection):
    """``task: embedding``: pairs of texts that belong together, or that have a score of how alike they are."""

    train: DataSource | None = Field(default=None, description="What to train on.")
    valid: DataSource | None = Field(default=None, description="Of the loss during training.")
    test: DataSource | None = Field(default=None, description="To score.")
    format: TableFormat = Field(default="auto", description=TABLE_FORMAT)
    text: str = Field(default="text", description="Name of the column with the first text.")
    second_text: str = Field(default="second_text", description="Name of the column with its partner.")
    score: str | None = Field(
        default=None,
        description="Name of the column with the score of a pair; none where all pairs belong together.",
    )
    lowest: float = Field(default=0.0, description="The score of texts that have nothing in common.")
    highest: float = Field(default=1.0, description="The score of texts that mean the same.")
    where: dict[str, str | int] = Field(
        default_factory=dict,
        description="Read only rows whose columns have these values: `{label_name: entailment}`.",
    )
    max_rows: dict[Literal["train", "valid", "test"], int] = Field(default_factory=dict, description=MAX_ROWS)

    @model_validator(mode="after")
    def _check(self) -> PairData:
        check_splits(self)
        if not self.lowest < self.highest:
            raise ConfigError(f"lowest ({self.lowest:g}) must be below highest ({self.highest:g}).")
        return self


class ImageData(DataSection):
    """``task: image-classification``: arrays in an npz file, or folders of pictures."""

    train: InputPath | None = Field(
        default=None,
        description="What to train on: an npz file with `x` (rows, height, width, perhaps 3; uint8) and `y`, or a "
        "folder with a folder of pictures for each class.",
    )
    valid: InputPath | None = Field(default=None, description="Of loss and accuracy during training.")
    test: InputPath | None = Field(default=None, description="To score.")
    classes: list[str] | None = Field(
        default=None, description="Names of the classes of an npz file, in the order of their numbers."
    )
    size: int | None = Field(
        default=None, ge=1, description="Height and width that the model gets; by default what it asks for."
    )
    mean: list[float] | None = Field(
        default=None,
        description="Subtracted from each channel, of values from 0 to 1; by default as the model's.",
    )
    std: list[float] | None = Field(
        default=None, description="What each channel is then divided by; by default as the model's."
    )
    flip: bool = Field(default=False, description="Train on each picture's mirror image too.")
    max_rows: dict[Literal["train", "valid", "test"], int] = Field(default_factory=dict, description=MAX_ROWS)

    @model_validator(mode="after")
    def _check(self) -> ImageData:
        check_splits(self)
        if (self.mean is None) != (self.std is None):
            raise ConfigError("mean and std belong together: give both or neither.")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ConfigError("std divides, so it must be above 0.")
        return self
