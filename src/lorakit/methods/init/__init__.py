"""How the factors of a low-rank method start, one way a file.

An initialisation takes the target, the rank and a generator and returns ``(A, B)`` with ``B A = 0``, so that
training starts from the base model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorakit.core.target import Target
from lorakit.methods.init.gaussian import gaussian
from lorakit.methods.init.kaiming import kaiming

Init = Callable[[Target, int, "torch.Generator | None"], "tuple[Tensor, Tensor]"]
INITS: dict[str, Init] = {"kaiming": kaiming, "gaussian": gaussian}

__all__ = ["INITS", "Init"]
