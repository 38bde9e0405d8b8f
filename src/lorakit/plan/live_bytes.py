"""Counting what is alive on the meta device, where tensors have sizes and no numbers."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that come to be inside the block, until they are freed.

    Args:
        padded: Whether not all of a mask is set, where that is asked.

    Attributes:
        live: Bytes alive now.
        peak: The most there were.
    """

    def __init__(self, padded: bool = False) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._padded = padded
        self._whether_any: Tensor | None = None
        self._seen: dict[int, object] = {}

    def ignore(self, tensor: Tensor) -> None:
        """Leave out a tensor that was there before; the caller keeps it alive."""
        storage = tensor.untyped_storage()
        self._seen[storage._cdata] = storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            if args[0].dtype is torch.bool:
                # Asked of a mask: is any of it set, or (in several ways) all of it?
                return args[0] is self._whether_any or not self._padded
            return 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.index_put.default and not torch.is_grad_enabled():
            # The derivative of indexing copies its zeros only where a mode such as this one looks on.
            func = torch.ops.aten.index_put_.default
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.any.default:
            self._whether_any = result
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_meta:
                self._watch(value)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def freed(_: object) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self.live += size
        self.peak = max(self.peak, self.live)
        self._seen[key] = weakref.ref(storage, freed)
