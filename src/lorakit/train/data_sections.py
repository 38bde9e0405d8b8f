"""The section ``data`` of a recipe: a built-in task, files of conversations, or tables of labelled texts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lorakit.errors import ConfigError
from lorakit.train.data_source import DataSource
from lorakit.train.sections import InputPath, Section

Format = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "seq2seq", "preference", "generate",
    "text2sql",
]  # fmt: skip
TableFormat = Literal["auto", "jsonl", "json", "csv", "tsv", "txt", "parquet"]
TextRows = Literal["line", "paragraph", "file"]

MAX_ROWS = "Read only the first rows of a split: `{train: 100}`."
TABLE_FORMAT = (
    "`jsonl`, `json` (a list of objects), `csv` or `tsv` (with a line of names) or `parquet`; `auto` tells by the "
    "file's ending."
)


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
    """Files, folders of files, or data sets of the hub."""

    train: DataSource | None = Field(
        default=None, description="What to train on: a file, a folder of files, or `hub:OWNER/NAME:SPLIT`."
    )
    valid: DataSource | None = Field(default=None, description="Of the loss during training.")
    test: DataSource | None = Field(default=None, description="To score.")
    format: Format = Field(
        default="auto", description="What the rows hold; `auto` tells by the keys of the first row."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Columns that have other names: from a key of the format to the file's, `{prompt: question}`.",
    )
    files: TableFormat = Field(
        default="auto",
        description="How the files are written: `jsonl`, `json`, `csv`, `tsv`, `txt` or `parquet`; `auto` tells by "
        "their endings.",
    )
    texts: TextRows = Field(
        default="paragraph", description="`txt` files: what a row is; paragraphs end at an empty line."
    )
    divide: bool = Field(
        default=True,
        description="`text`: divide a text that is longer than `train.max_length` into several rows; otherwise "
        "`train.overlong` says what becomes of it.",
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
    learn: Literal["all", "last", "each"] = Field(
        default="all",
        description="`messages`, `sharegpt`: learn every answer of a conversation, or the `last` one only; `each` "
        "makes a row of every answer, for templates that rewrite earlier ones.",
    )
    system: str | None = Field(default=None, description="System message put before rows that have none.")
    max_rows: dict[Literal["train", "valid", "test"], int] = Field(default_factory=dict, description=MAX_ROWS)

    @model_validator(mode="after")
    def _check(self) -> FileData:
        check_splits(self, "; or a built-in task: builtin")
        return self


class LabelledData(DataSection):
    """Tables of texts and labels, plain or gzipped."""

    train: DataSource | None = Field(
        default=None,
        description="What to train on: a file, a folder of files, or `hub:OWNER/NAME:SPLIT`. Its labels are learnt.",
    )
    valid: DataSource | None = Field(default=None, description="Of loss and accuracy during training.")
    test: DataSource | None = Field(default=None, description="To score.")
    format: TableFormat = Field(
        default="auto",
        description=TABLE_FORMAT,
    )
    text: str = Field(default="text", description="Name of the column with the text.")
    second_text: str | None = Field(
        default=None, description="Name of the column with the second text, where pairs are classified."
    )
    label: str = Field(
        default="label", description="Name of the column with the label, a word or a whole number."
    )
    max_rows: dict[Literal["train", "valid", "test"], int] = Field(default_factory=dict, description=MAX_ROWS)

    @model_validator(mode="after")
    def _check(self) -> LabelledData:
        check_splits(self)
        return self


def check_splits(data: Any, otherwise: str = "") -> None:
    """A section with ``train``, ``valid``, ``test`` and ``max_rows`` names at least one split, and no empty ones.

    Args:
        data: The section.
        otherwise: What else it could say, for the message.

    Raises:
        ConfigError: It is not so.
    """
    if data.train is None and data.valid is None and data.test is None:
        raise ConfigError(f"name at least one file: train, valid or test{otherwise}.")
    if any(rows < 1 for rows in data.max_rows.values()):
        raise ConfigError("max_rows must be at least 1.")
