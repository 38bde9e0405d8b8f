"""What a file format is: how it is recognised, read and written. One format a module, one table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lorakit.core.adapter import AdapterState
from lorakit.io.formats.names import Names

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Hints:
    """What a file does not say of itself.

    Attributes:
        names: The layers of the model.
        alpha: The alpha of every target, for formats that keep none.
        slots: Which of the equal parts of a fused projection are adapted (loralib's ``enable_lora``).
        family: llama.cpp's word for the model's architecture.
        heads: Query heads and key heads of a Llama model, whose rows GGUF keeps in another order.
    """

    names: Names | None = None
    alpha: float | None = None
    slots: tuple[bool, ...] = ()
    family: str | None = None
    heads: tuple[int, int] | None = None


@dataclass(frozen=True)
class Written:
    """A file's content, and what of the adapter is not in it.

    Attributes:
        tensors: By key.
        metadata: Of the file.
        losses: Sentences; none of them is about what the adapter computes, but for rounding.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        name: The word for it on the command line.
        title: What the documentation calls it.
        recognises: Whether tensors and metadata are of this format.
        read: From tensors and metadata to an adapter.
        write: The inverse.
        container: How tensors are kept: ``.safetensors``, a pickle of torch, or ``.gguf``.
    """

    name: str
    title: str
    recognises: Callable[[Tensors, Mapping[str, str]], bool]
    read: Callable[[Tensors, Mapping[str, str], Hints], AdapterState]
    write: Callable[[AdapterState, Hints], Written]
    container: Literal["safetensors", "pickle", "gguf"] = "safetensors"
