"""Choosing layers by what they do, where the model's architecture says what they are called."""

from __future__ import annotations

from torch import nn

from lorakit.core.architectures import LAYER_NAMES
from lorakit.core.selection import pattern_matches
from lorakit.core.target import Target
from lorakit.errors import UnmatchedTargetError


def is_key_value_or_feedforward(target: Target | str, model: nn.Module, path: str) -> bool:
    """Whether a layer makes attention keys or values, or leads out of a feed-forward block.

    Raises:
        UnmatchedTargetError: The model's ``config.model_type`` is none that is known here.
    """
    architecture = str(getattr(getattr(model, "config", None), "model_type", None) or "")
    if architecture not in LAYER_NAMES:
        found = (
            f"the architecture {architecture!r}"
            if architecture
            else f"a {type(model).__name__} without config"
        )
        raise UnmatchedTargetError(
            "The layers of attention keys and values and of the feed-forward block are found by the names that they "
            f"have in known architectures, and {found} is not known. Name the targets, and for IA3 also those whose "
            f"input is to be scaled (feedforward). Known: {', '.join(sorted(LAYER_NAMES))}."
        )
    return any(pattern_matches(name, path) for names in LAYER_NAMES[architecture] for name in names)
