"""Token rows: new values for a few rows of an embedding table, for tokens that a task adds or changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.core.method import Tensors, WeightMethod
from lorakit.core.registry import register
from lorakit.core.target import Shape, Target
from lorakit.errors import ConfigError


@register("token_rows")
@dataclass(frozen=True)
class TokenRows(WeightMethod):
    """Replace the vectors of the tokens ``ids``; every other row is untouched.

    Where an output head is tied to the embedding, the same rows act there too. Parameters per target: ``rows``
    ``(len(ids), width)``, replacements and not differences. The table itself is never rebuilt.

    Attributes:
        ids: Token ids, each once.
    """

    ids: tuple[int, ...] = ()

    roles: ClassVar[Mapping[str, str]] = {"rows": "copy"}
    follows_ties: ClassVar[bool] = True

    def __post_init__(self) -> None:
        try:
            ids = tuple(index(i) for i in self.ids)
        except TypeError:
            ids = ()
        if not ids or min(ids) < 0 or len(set(ids)) != len(ids):
            raise ConfigError(
                f"TokenRows takes one or more different token ids of at least 0; got {str(self.ids)[:80]}."
            )
        object.__setattr__(self, "ids", ids)

    def shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """``rows``, ``(len(ids), width)``."""
        return {"rows": (len(self.ids), shape.out if shape.lookup else shape.in_)}

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """The rows as they are in the base."""
        W = target.weight()
        return {"rows": (W.mT if target.shape.lookup else W)[self._index(W)].clone()}

    def weight(self, target: Target, p: Tensors, W: Tensor) -> Tensor:
        """The table with the rows put in."""
        rows = p["rows"].to(W.dtype)
        if target.shape.lookup:
            return W.index_copy(-1, self._index(W), rows.mT)
        return W.index_copy(-2, self._index(W), rows)

    def at_rows(self, shape: Shape, tensors: Tensors, start: int, stop: int) -> tuple[TokenRows, Tensors]:
        """A part of each vector of a table; in a head, where each token is an output row, the tokens among these."""
        rows = tensors["rows"]
        if shape.lookup:
            return self, {"rows": rows[:, start:stop]}
        among = [place for place, token in enumerate(self.ids) if start <= token < stop]
        return _SomeRows(tuple(self.ids[place] - start for place in among)), {"rows": rows[among]}

    def forward(self, target: Target, p: Tensors, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
        """Only the affected places: looked-up tokens in an embedding, columns of the logits in a head."""
        rows = p["rows"].to(y.dtype)
        if target.shape.lookup:
            place = torch.full((target.in_,), -1, dtype=torch.long, device=x.device)
            place[self._index(x)] = torch.arange(len(self.ids), device=x.device)
            which = place[x]
            rows = rows if target.gain == 1 else rows * target.gain
            return torch.where((which >= 0).unsqueeze(-1), rows[which.clamp_min(0)], y)
        logits = torch.nn.functional.linear(x.to(y.dtype), rows)
        bias = target.bias
        if bias is not None:
            logits = logits + bias[self._index(bias)].to(y.dtype)
        return y.index_copy(-1, self._index(y), logits)

    def supports(self, target: Target) -> str | None:
        """An embedding, or the head tied to it."""
        if target.binding == "parameter" or target.batch or target.shape.kind not in ("embedding", "linear"):
            return "token rows belong to an embedding table, or to a head tied to one"
        size = target.in_ if target.shape.lookup else target.out
        if max(self.ids) >= size:
            return f"token id {max(self.ids)} is outside its table of {size} rows"
        return None

    def _index(self, like: Tensor) -> Tensor:
        return torch.tensor(self.ids, dtype=torch.long, device=like.device)


@dataclass(frozen=True)
class _SomeRows(TokenRows):
    """What is left of token rows in a part of a head: maybe none."""

    def __post_init__(self) -> None:
        """Nothing to check: they come from `TokenRows`."""
