"""What our files carry in the metadata of the weights: their own configuration, and what PEFT's has no words for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import AdapterFileError
from lorakit.io.safetensors_file import load_metadata

KEY = "lorakit"


@dataclass(frozen=True)
class Embedded:
    """The metadata entry ``lorakit``, a JSON object.

    Attributes:
        config: The content of ``adapter_config.json`` as it was written with these weights.
        info: `AdapterSpec.info`.
        parameters: Module path to its adapted bare parameters ``[name, stored size, kept as (in, out)]``, innermost
            first: PEFT's keys number them and its configuration does not give their sizes.
        tables: For token rows, path to ``[kind, out, in]`` of the table.
        shapes: For PEFT's types beside LoRA, target path to ``[kind, out, in, kernel]``: the tensors do not say it all.
    """

    config: Mapping[str, Any]
    info: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """As the metadata of a ``.safetensors`` file."""
        try:
            text = json.dumps(vars(self), separators=(",", ":"), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AdapterFileError(f"The adapter's spec.info must hold plain JSON: {error}.") from None
        return {"format": "pt", KEY: text}


def parse_embedded(path: Path, metadata: Mapping[str, str]) -> Embedded | None:
    """What the metadata says, or None when another library wrote the file.

    Raises:
        AdapterFileError: It is there but not as we write it.
    """
    if KEY not in metadata:
        return None
    try:
        return Embedded(**json.loads(metadata[KEY]))
    except (TypeError, ValueError) as error:
        raise AdapterFileError(
            f"{path} has metadata that this version of lorakit does not know: {error}."
        ) from None


def embedded_in(path: Path) -> Embedded | None:
    """The same from a file; None also when there is no sound file."""
    try:
        return parse_embedded(path, load_metadata(path))
    except (OSError, AdapterFileError):
        return None
