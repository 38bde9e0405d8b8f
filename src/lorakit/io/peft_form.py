"""An adapter in PEFT's terms: what the writers of PEFT's types fill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class PeftForm:
    """An adapter in PEFT's terms.

    Attributes:
        config: All keys of ``adapter_config.json``.
        tensors: Key to tensor, in the file's layout.
        parameters: See `lorakit.io.embedded.Embedded`.
        tables: The same.
        shapes: The same.
        reasons: Why it cannot be said; when there is one, nothing else is to be used.
    """

    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, list[tuple[str, tuple[int, ...], bool]]] = field(default_factory=dict)
    tables: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    shapes: dict[str, tuple[str, int, int, tuple[int, ...]]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
