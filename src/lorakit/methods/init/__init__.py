"""How the factors of a low-rank method start, one way a file, and the table of them all.

A start takes the target, the rank and a generator and returns ``(A, B)``. Either ``B A = 0``, so that training begins
at the base model; or the start is *subtracted*: the change is measured from it, ``s (B A - B_0 A_0)``, and begins at
zero whatever the factors are. The base weight is never changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from lorakit.core.target import Target
from lorakit.errors import ConfigError, near_matches
from lorakit.methods.init.gaussian import gaussian
from lorakit.methods.init.kaiming import kaiming
from lorakit.methods.init.measured import measured
from lorakit.methods.init.olora import olora
from lorakit.methods.init.orthogonal import orthogonal
from lorakit.methods.init.pissa import pissa, pissa_by_projection

Start = Callable[[Target, int, "torch.Generator | None"], "tuple[Tensor, Tensor]"]


@dataclass(frozen=True)
class Init:
    """One way to start.

    Attributes:
        start: Makes ``A`` and ``B`` for a target.
        subtracted: Whether the change is measured from the start, which is then kept beside the factors.
        of_change: Whether what ``start`` gives is ``s B A``: both factors are divided by the root of the scale.
        needs: The function that computes the start from data; empty where the weight alone is enough.
        lowers_rank: Whether that function gives each target at most the rank that it can have.
    """

    start: Start
    subtracted: bool = False
    of_change: bool = False
    needs: str = ""
    lowers_rank: bool = False

    def factors(
        self, target: Target, r: int, scale: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """``A`` ``(*batch, r, in)`` and ``B`` ``(*batch, out, r)``; padding has no part in them.

        Raises:
            ConfigError: They have to be computed from data first, or the scale is 0 and they should give a change.
        """
        if self.needs and target.measured is None:
            raise ConfigError(
                f"This init cannot be made from the weight of {target.path!r} alone: {self.needs} makes it, and "
                "returns an adapter to attach (with trainable=True to train it)."
            )
        A, B = self.start(target, r, generator)
        if self.of_change:
            if not scale:
                raise ConfigError(f"alpha=0 leaves nothing of the start at {target.path!r}.")
            root = math.sqrt(abs(scale))
            A, B = A / root, B / math.copysign(root, scale)
        if target.padding is not None:
            A = A.index_fill(-1, torch.tensor(target.padding, device=A.device), 0)
        return A.contiguous(), B.contiguous()  # decompositions give columns


INITS: dict[str, Init] = {
    "kaiming": Init(kaiming),
    "gaussian": Init(gaussian),
    "orthogonal": Init(orthogonal),
    "pissa": Init(pissa, subtracted=True, of_change=True),
    "olora": Init(olora, subtracted=True),
    "eva": Init(measured, needs="lorakit.eva", lowers_rank=True),
    "lora_ga": Init(measured, subtracted=True, needs="lorakit.lora_ga"),
    "given": Init(measured, subtracted=True, needs="lorakit.read(..., initial=...)"),
}
"""By name; ``pissa_niter_N`` stands beside ``pissa`` for every N, see `init_called`."""


@cache
def init_called(name: str) -> Init:
    """The way to start that a name means.

    Raises:
        ConfigError: None has that name.
    """
    if name in INITS:
        return INITS[name]
    if found := re.fullmatch(r"pissa_niter_(\d+)", str(name)):
        fast = partial(pissa_by_projection, iterations=int(found[1]))
        return Init(fast, subtracted=True, of_change=True)
    known = sorted([*INITS, "pissa_niter_N"])
    raise ConfigError(f"No init is called {name!r}.{near_matches(str(name), known)} Known: {known}.")


__all__ = ["INITS", "Init", "Start", "init_called"]
