"""How many bytes autograd keeps for the backward pass of what is computed on a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Kept:
    """The storages that are kept, each once, without those that the model has anyway."""

    def __init__(self, model: nn.Module) -> None:
        tensors = (*model.parameters(), *model.buffers())
        self._there = {t.untyped_storage().data_ptr() for t in tensors}
        self._storages: dict[int, torch.UntypedStorage] = {}

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        """Called with each tensor that is saved."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._there:
            self._storages[storage.data_ptr()] = storage
        return tensor


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[Kept]:
    """Count inside a ``with`` block; the storages stay alive, so that no two of them share an address."""
    kept = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
        yield kept
