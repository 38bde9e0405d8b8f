"""Where a split comes from: a file, a folder of files, or a data set of the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import GetPydanticSchema, ValidationInfo
from pydantic_core import core_schema

_HUB = "hub:"
_FORM = re.compile(
    r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<config>[\w.-]+))?:(?P<split>[\w\[\]:%+.-]+)"
)


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set of the hub, as ``hub:OWNER/NAME[@REVISION][/CONFIG]:SPLIT``.

    Attributes:
        name: ``OWNER/NAME``.
        config: Which of its configurations; None for the only one.
        split: As the data set calls it; a part as ``train[:1000]``.
        revision: A branch, tag or commit.
    """

    name: str
    split: str
    config: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubSplit:
        """Read the written form.

        Raises:
            ValueError: It is not of that form.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(
                "a data set of the hub is written hub:OWNER/NAME:SPLIT, or hub:OWNER/NAME@REVISION/CONFIG:SPLIT"
            )
        return cls(**match.groupdict())

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        config = "" if self.config is None else f"/{self.config}"
        return f"{_HUB}{self.name}{revision}{config}:{self.split}"


def _source(value: Any, info: ValidationInfo) -> Path | HubSplit:
    if isinstance(value, (Path, HubSplit)):
        path = value
    elif isinstance(value, str):
        path = HubSplit.parse(value) if value.startswith(_HUB) else Path(value)
    else:
        raise ValueError("it should be a path, or hub:OWNER/NAME:SPLIT")
    if isinstance(path, HubSplit):
        return path
    folder = (info.context or {}).get("folder")
    path = path.expanduser()
    return path if folder is None else Path(folder, path)


def _schema(_: Any, __: Any) -> core_schema.CoreSchema:
    return core_schema.with_info_plain_validator_function(
        _source,
        json_schema_input_schema=core_schema.str_schema(),
        serialization=core_schema.plain_serializer_function_ser_schema(
            str, return_schema=core_schema.str_schema(), when_used="json"
        ),
    )


DataSource = Annotated[Path | HubSplit, GetPydanticSchema(_schema)]
"""What is read; a path is relative to the recipe's own folder."""
