"""A model made from a table of its layers: for architectures whose code is in no library that lorakit needs.

Such a model has the names and sizes of the real one and no forward pass: its numbers can be counted, and what it does
with an input cannot be rehearsed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lorakit.errors import ModelError, listing

_CONVS: Mapping[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _convolution(entry: Mapping[str, Any]) -> nn.Module:
    out, channels, *kernel = entry["conv"]
    return _CONVS[len(kernel)](channels, out, tuple(kernel), bias=entry.get("bias", True))


KINDS: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "linear": lambda entry: nn.Linear(entry["linear"][1], entry["linear"][0], bias=entry.get("bias", True)),
    "conv": _convolution,
    "embedding": lambda entry: nn.Embedding(*entry["embedding"]),
    "norm": lambda entry: nn.LayerNorm(entry["norm"]),
    "batchnorm": lambda entry: nn.BatchNorm2d(entry["batchnorm"]),
}
"""What an entry may be: a linear layer ``[out, in]``, a convolution ``[out, in, *kernel]``, a table ``[rows, width]``,
or a norm (a weight and a bias for each feature)."""


class TableModel(nn.Module):
    """Names and sizes; it cannot be run."""


def table_model(layers: Mapping[str, Mapping[str, Any]]) -> TableModel:
    """The model of a table: path to one of ``KINDS`` with its sizes. On the meta device; nothing is allocated.

    Raises:
        ModelError: An entry is of no known kind.
    """
    root = TableModel()
    with torch.device("meta"):
        for path, entry in layers.items():
            kinds = [kind for kind in KINDS if kind in entry]
            if len(kinds) != 1:
                raise ModelError(
                    f"The layer {path!r} of a table must be one of {listing(KINDS)}; it is {dict(entry)}."
                )
            *parents, name = path.split(".")
            owner: nn.Module = root
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, nn.Module())
                owner = owner._modules[parent]  # type: ignore[assignment]
            owner.add_module(name, KINDS[kinds[0]](entry))
    return root
