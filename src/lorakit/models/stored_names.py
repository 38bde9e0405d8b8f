"""Which tensor of a checkpoint is which parameter of the model, by the renamings that transformers makes in loading."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

_OLD_NAMES = {"weight": "gamma", "bias": "beta"}  # of a LayerNorm, in checkpoints that came from TensorFlow


class StoredNames:
    """Parameter path to tensor name: the same, or without or with the prefix of the base model, or by an older name.

    Args:
        model: The model, which may be on the meta device.
        names: What the checkpoint holds.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self._names = names
        prefix = getattr(model, "base_model_prefix", "")
        self._prefix = f"{prefix}." if isinstance(prefix, str) and prefix else ""

    def find(self, path: str) -> str | None:
        """The name of a parameter's tensor, or None when the checkpoint does not hold it so."""
        return next((name for name in self._possible(path) if name in self._names), None)

    def invent(self, path: str, beside: str, beside_path: str) -> str:
        """A name for a parameter that is not in the checkpoint, after the one of another parameter that is.

        Args:
            path: Of the parameter.
            beside: The name of the other's tensor.
            beside_path: The other's path.
        """
        if self._prefix and beside == self._prefix + beside_path:
            return self._prefix + path
        return path

    def _possible(self, path: str) -> list[str]:
        paths = [path]
        if self._prefix:
            bare = path.removeprefix(self._prefix)
            paths.append(bare if bare != path else self._prefix + path)
        owner_name = [p.rpartition(".") for p in paths]
        old = [f"{owner}.{_OLD_NAMES[name]}" for owner, _, name in owner_name if name in _OLD_NAMES]
        return [*paths, *old]
