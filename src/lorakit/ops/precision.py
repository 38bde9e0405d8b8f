"""Keeping a computation in the dtype of its operands."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def own_precision(like: Tensor) -> AbstractContextManager[object]:
    """A block in which autocast does not round products on the device of ``like`` to its own dtype."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)
