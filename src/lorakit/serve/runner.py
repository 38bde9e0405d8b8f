"""The contract between the engine and what computes a step: one packed row of tokens in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from lorakit.serve.kv import KVArena, Slab
    from lorakit.serve.versions import AdapterVersion


class Segment(NamedTuple):
    """Neighbouring rows of one adapter.

    Attributes:
        start: First row.
        end: One past the last row.
        version: The adapter; None is the base model.
    """

    start: int
    end: int
    version: AdapterVersion | None


class Piece(NamedTuple):
    """Neighbouring rows of one request.

    Attributes:
        start: First row.
        end: One past the last row.
        past: Tokens that the request's slab holds before these.
        slab: Where its keys and values are.
    """

    start: int
    end: int
    past: int
    slab: Slab


@dataclass
class StepBatch:
    """What one step computes: one packed row of T tokens, each adapter's side by side.

    Attributes:
        tokens: ``(T,)`` int64.
        positions: ``(T,)`` int64, of each token in its own request.
        segments: They cover all rows, in order; no adapter twice.
        pieces: They cover all rows, in order; each lies in one segment.
        last: ``(n,)`` int64, ascending: the rows whose logits are wanted.
    """

    tokens: Tensor
    positions: Tensor
    segments: Sequence[Segment]
    pieces: Sequence[Piece]
    last: Tensor


class ModelRunner(Protocol):
    """A base model that runs steps for many adapters. One thread calls ``step``; the rest may be called from any.

    Attributes:
        arena: The keys and values.
        vocabulary: Width of the logits.
        context: The most tokens of one request, prompt and answer together.
    """

    arena: KVArena
    vocabulary: int
    context: int

    def prepare(self, version: AdapterVersion) -> None:
        """Make an adapter ready to run; does nothing when it is.

        Raises:
            ServeError: It cannot be run here; the message names the target.
        """

    def forget(self, version: AdapterVersion) -> None:
        """Let go of what ``prepare`` made; does nothing when there is nothing. No request may use it any more."""

    def step(self, batch: StepBatch) -> Tensor:
        """Logits ``(n, vocabulary)`` in float32 of the rows ``batch.last``; writes keys and values of all rows."""
