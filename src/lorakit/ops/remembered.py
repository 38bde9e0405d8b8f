"""Results that are kept for as long as the tensors they were computed from stay as they are.

Nothing is written to a module or a tensor: a `Remembered` is a table of its own, keyed by a tensor that it does not
keep alive, so models can be copied, pickled and run by several threads as if it were not there.

A tensor counts as unchanged when it is the same object with the same version counter, on the same storage at the
same address. Torch's operations and optimizers raise the counter, with two exceptions that are met otherwise:

- fused optimizers do not, so a call that could start a gradient of one of the tensors forgets what was there, and of a
  tensor that has a gradient the numbers themselves are compared (their sum and their norm);
- inference tensors have no counter, so nothing is remembered about them.

What remains is a write through ``tensor.data`` (or by a foreign kernel) between two calls without gradients: it leaves
no trace. Write to the tensor itself under ``torch.no_grad()``, or call `Remembered.forget`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lorakit.ops.low_rank import transformed

T = TypeVar("T")


class _Seal(NamedTuple):
    """What tells a tensor from a changed one. The weak reference to the storage keeps its address from being reused."""

    tensor: weakref.ref[Tensor]
    version: int
    address: int
    storage: StorageWeakRef
    numbers: tuple[float, ...]

    def holds(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and tensor._version == self.version
            and tensor.data_ptr() == self.address
            and tensor.untyped_storage()._cdata == self.storage.cdata
            and _numbers(tensor) == self.numbers
        )


def _numbers(tensor: Tensor) -> tuple[float, ...]:
    """What an optimizer's step would change; empty where none can come."""
    if tensor.grad is None:
        return ()
    t = tensor.detach()
    return float(t.sum()), float(torch.linalg.vector_norm(t))


@dataclass(frozen=True, slots=True)  # a generic NamedTuple needs Python 3.11
class _Entry(Generic[T]):
    seals: tuple[_Seal, ...]
    by: object
    value: T


class Remembered(Generic[T]):
    """A table from a tensor, the owner, to something that was computed from it and others.

    When the owner dies its entries go with it.
    """

    def __init__(self) -> None:
        self._tables: dict[int, tuple[weakref.ref[Tensor], dict[Hashable, _Entry[T]]]] = {}

    def recall(
        self,
        owner: Tensor,
        place: Hashable,
        tensors: Sequence[Tensor],
        by: object,
        compute: Callable[[], T],
    ) -> T:
        """What ``compute`` gives, computed anew only if one of the tensors changed since.

        Args:
            owner: The tensor that the entry lives with.
            place: Which of the owner's entries.
            tensors: All that the result depends on.
            by: The object that says how it is computed; with another one it is computed anew.
            compute: Makes the result; it must not depend on anything else.
        """
        if transformed():
            return compute()
        if not _may_be_remembered(tensors):
            self.forget(owner)
            return compute()
        entry = self._table(owner).get(place)
        if entry is not None and entry.by is by and _unbroken(entry.seals, tensors):
            return entry.value
        seals = _sealed(tensors)  # before computing: a write from another thread meanwhile is then noticed
        # Whatever mode this call is in, a later one may need the result for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        if seals is not None:
            self._table(owner)[place] = _Entry(seals, by, value)
        return value

    def forget(self, owner: Tensor) -> None:
        """Drop what is kept for a tensor."""
        self._tables.pop(id(owner), None)

    def __len__(self) -> int:
        """How many results are kept."""
        return sum(len(table) for _, table in list(self._tables.values()))

    def _table(self, owner: Tensor) -> dict[Hashable, _Entry[T]]:
        found = self._tables.get(id(owner))
        if found is not None and found[0]() is owner:
            return found[1]
        number = id(owner)

        def gone(reference: weakref.ref[Tensor]) -> None:
            kept = self._tables.get(number)
            if kept is not None and kept[0] is reference:
                self._tables.pop(number, None)

        table: dict[Hashable, _Entry[T]] = {}
        self._tables[number] = weakref.ref(owner, gone), table
        return table


def _unbroken(seals: Sequence[_Seal], tensors: Sequence[Tensor]) -> bool:
    return len(seals) == len(tensors) and all(
        seal.holds(tensor) for seal, tensor in zip(seals, tensors, strict=True)
    )


def _may_be_remembered(tensors: Sequence[Tensor]) -> bool:
    """Whether none of the tensors is being trained, or has no counter of its changes."""
    trains = torch.is_grad_enabled()
    return not any(t.is_inference() or (trains and t.requires_grad) for t in tensors)


def _sealed(tensors: Sequence[Tensor]) -> tuple[_Seal, ...] | None:
    """A seal for each tensor; None where one has no memory of its own (a wrapper of others)."""
    try:
        return tuple(
            _Seal(weakref.ref(t), t._version, t.data_ptr(), StorageWeakRef(t.untyped_storage()), _numbers(t))
            for t in tensors
        )
    except (RuntimeError, NotImplementedError):
        return None


def tensors_in(*groups: Any) -> tuple[Tensor, ...]:
    """The tensors among the values of some mappings."""
    return tuple(value for group in groups for value in group.values() if isinstance(value, Tensor))
