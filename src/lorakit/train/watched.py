"""Whether a layer's call may be made in another way: only where nobody would miss it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as of_all_modules


def plain_calls() -> bool:
    """Whether calls of layers are what their code says: no autocast, and no hook of torch's that all modules have."""
    tables = (
        of_all_modules._global_forward_pre_hooks,
        of_all_modules._global_forward_hooks,
        of_all_modules._global_backward_pre_hooks,
        of_all_modules._global_backward_hooks,
    )
    return not any(tables) and not torch.is_autocast_enabled("cpu")


def watched(layer: nn.Module, but: Sequence[Callable[..., Any]] = ()) -> bool:
    """Whether somebody sees or changes what goes into a layer or comes out of it.

    Args:
        layer: The layer.
        but: Forward hooks that are known, all of them.
    """
    others = layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(others) or list(layer._forward_hooks.values()) != list(but) or "forward" in layer.__dict__
