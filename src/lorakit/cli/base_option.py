"""The option ``--base`` of the commands for adapters alone: the weights that DoRA and IA3 are measured from."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.core import AdapterState

HELP = "The base's folder with safetensors: DoRA, IA3 and trained copies are then taken as what they change in it."


def base_weights(folder: Path | None, states: Sequence[AdapterState]) -> Mapping[str, Tensor] | None:
    """The base weights of all targets, read when they are asked for; None without a folder.

    Raises:
        ConfigError: The folder holds no weight of any target.
    """
    if folder is None:
        return None
    from lorakit.adapters.base_weights import BaseWeights
    from lorakit.adapters.checkpoints import CONV1D, CONV1D_MODELS
    from lorakit.errors import ConfigError
    from lorakit.io.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    gpt2 = checkpoint.config.get("model_type") in CONV1D_MODELS
    found = [BaseWeights(checkpoint, state, transposed=CONV1D if gpt2 else None) for state in states]
    if not any(found):
        path, reason = next(iter(found[0].missing.items()), ("nothing", "it has no targets"))
        raise ConfigError(f"{folder} holds no weight that the adapters change: for {path}, {reason}.")
    return ChainMap(*found)  # type: ignore[arg-type]  # nothing is ever written to it
