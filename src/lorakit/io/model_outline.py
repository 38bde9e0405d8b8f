"""Drawing up a model's outline: the only place in `lorakit.io`, beside saving and loading, that sees a model."""

from __future__ import annotations

from torch import nn

from lorakit.core.walk import base_modules, join
from lorakit.io.outline import Outline


def outline_of(model: nn.Module) -> Outline:
    """The outline of a model, the adapters on it left out.

    Args:
        model: With or without adapters.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    transposed, embeddings = set(), set()
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                sizes[join(path, name)] = tuple(parameter.shape)
        if getattr(module, "is_transposed", False):
            transposed.add(path)
        if isinstance(module, nn.Embedding):
            embeddings.add(path)
    return Outline(sizes, frozenset(transposed), frozenset(embeddings))
