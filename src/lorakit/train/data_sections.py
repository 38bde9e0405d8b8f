"""The section ``data`` of a recipe: a built-in task, files of conversations, or tables of labelled texts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lorakit.errors import ConfigError
from lorakit.train.sections import InputPath, Section

Format = Literal["auto", "messages", "prompt_completion", "generate", "text2sql"]
TableFormat = Literal["auto", "jsonl", "json", "csv", "tsv"]


class DataSection(Section):
    """Where examples come from: a `BuiltinData` with ``builtin``, else a `FileData`; to classify, a `LabelledData`."""


class BuiltinData(DataSection):
    """A built-in task: its examples are made, not read."""

    builtin: Literal["text_to_sql"] = Field(description="Its name; `text_to_sql` is there.")
    train: int = Field(default=1000, ge=0, description="Examples to train on.")
    valid: int = Field(default=0, ge=0, description="Examples for the loss during training; 0 for none.")
    test: int = Field(default=200, ge=0, description="Examples to score.")
    seed: int = Field(default=0, description="Another seed asks other questions about the same tables.")


class FileData(DataSection):
    """JSON lines files, plain or gzipped."""

    train: InputPath | None = Field(default=None, description="File to train on.")
    valid: InputPath | None = Field(default=None, description="File for the loss during training.")
    test: InputPath | None = Field(default=None, description="File to score.")
    format: Format = Field(
        default="auto", description="What the rows hold; `auto` tells by the keys of the first row."
    )
    databases: InputPath | None = Field(
        default=None, description="`text2sql`: folder of `DB_ID.sqlite` files."
    )
    schemas: InputPath | None = Field(
        default=None, description="`text2sql`: JSON file from `db_id` to CREATE TABLE text."
    )
    references: Literal["all", "first"] = Field(
        default="all", description="`generate`: train on each of a row's references, or on the first."
    )
    learn: Literal["all", "last"] = Field(
        default="all", description="`messages`: learn every answer of a conversation, or the last one only."
    )
    system: str | None = Field(default=None, description="System message put before rows that have none.")
    max_rows: dict[Literal["train", "valid", "test"], int] = Field(
        default_factory=dict, description="Read only the first rows of a split: `{train: 100}`."
    )

    @model_validator(mode="after")
    def _check(self) -> FileData:
        if self.train is None and self.valid is None and self.test is None:
            raise ConfigError("name at least one file: train, valid or test; or a built-in task: builtin.")
        if any(rows < 1 for rows in self.max_rows.values()):
            raise ConfigError("max_rows must be at least 1.")
        return self


class LabelledData(DataSection):
    """Tables of texts and labels, plain or gzipped."""

    train: InputPath | None = Field(
        default=None, description="File to train on; its labels are those that are learnt."
    )
    valid: InputPath | None = Field(default=None, description="File for loss and accuracy during training.")
    test: InputPath | None = Field(default=None, description="File to score.")
    format: TableFormat = Field(
        default="auto",
        description="`jsonl`, `json` (a list of objects), `csv` or `tsv` (with a line of names); `auto` tells by the "
        "file's ending.",
    )
    text: str = Field(default="text", description="Name of the column with the text.")
    second_text: str | None = Field(
        default=None, description="Name of the column with the second text, where pairs are classified."
    )
    label: str = Field(
        default="label", description="Name of the column with the label, a word or a whole number."
    )
    max_rows: dict[Literal["train", "valid", "test"], int] = Field(
        default_factory=dict, description="Read only the first rows of a split: `{train: 100}`."
    )

    @model_validator(mode="after")
    def _check(self) -> LabelledData:
        if self.train is None and self.valid is None and self.test is None:
            raise ConfigError("name at least one file: train, valid or test.")
        if any(rows < 1 for rows in self.max_rows.values()):
            raise ConfigError("max_rows must be at least 1.")
        return self
