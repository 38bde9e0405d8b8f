"""The option ``--base`` of the commands for adapters alone: the weights that DoRA and IA3 are measured from."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.adapters.base_weights import BaseWeights
    from lorakit.core import AdapterState

HELP = "The base's folder with safetensors: DoRA, IA3 and trained copies are then taken as what they change in it."


def base_weights(folder: Path | None, states: Sequence[AdapterState]) -> Mapping[str, Tensor] | None:
    """The base weights of all targets, read when they are asked for; None without a folder.

    Raises:
        ConfigError: The folder holds no weight of any target.
    """
    if folder is None:
        return None
    found = weights_of_each(folder, states)
    if not any(found):
        raise no_weight(folder, "the adapters change", found[0])
    return ChainMap(*found)  # type: ignore[arg-type]  # nothing is ever written to it


def weights_of_each(folder: Path, states: Sequence[AdapterState]) -> list[BaseWeights]:
    """For each adapter the base weights of its targets, read when they are asked for."""
    from lorakit.adapters.base_weights import BaseWeights
    from lorakit.adapters.checkpoints import conv1d_of
    from lorakit.io.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    return [BaseWeights(checkpoint, state, transposed=conv1d_of(checkpoint.config)) for state in states]


def no_weight(folder: Path, wanted: str, found: BaseWeights) -> ConfigError:
    """The error for a folder of another model.

    Args:
        folder: The base.
        wanted: What was looked for: what "the adapters change".
        found: What was not found there.
    """
    path, reason = next(iter(found.missing.items()), ("nothing", "it has no targets"))
    return ConfigError(f"{folder} holds no weight that {wanted}: for {path}, {reason}.")
