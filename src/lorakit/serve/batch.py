"""From the work of a step to the packed row that a runner takes, and from its logits back to the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorakit.serve.runner import Piece, Segment, StepBatch

if TYPE_CHECKING:
    from lorakit.serve.answer import Answer


@dataclass(frozen=True, slots=True)
class Work:
    """The next tokens of an answer that a step reads.

    Attributes:
        answer: Whose they are.
        count: How many.
    """

    answer: Answer
    count: int

    @property
    def complete(self) -> bool:
        """Whether nothing is left to read then, so that a token can be chosen."""
        return self.answer.unread == self.count


class Packed(NamedTuple):
    """A step.

    Attributes:
        batch: What the runner takes.
        work: In the order of its pieces.
        rows: For each work, which of the logits are its own.
    """

    batch: StepBatch
    work: list[Work]
    rows: list[slice]


def pack(work: Sequence[Work], device: torch.device | str = "cpu") -> Packed:
    """One row of all work, the rows of each adapter side by side, the base model's first."""
    work = sorted(work, key=lambda item: item.answer.digest or "")
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    pieces: list[Piece] = []
    last: list[int] = []
    rows: list[slice] = []
    for item in work:
        answer, count = item.answer, item.count
        start, past = len(tokens), answer.read
        tokens += answer.tokens[past : past + count]
        positions += range(past, past + count)
        end = len(tokens)
        pieces.append(Piece(start, end, past, answer.slab))
        before_it = segments[-1].version if segments else None
        if segments and (before_it and before_it.digest) == answer.digest:
            segments[-1] = segments[-1]._replace(end=end)
        else:
            segments.append(Segment(start, end, answer.version))
        before = len(last)
        if answer.wants_prompt_logprobs:
            last += range(start, end)
        elif item.complete:
            last.append(end - 1)
        rows.append(slice(before, len(last)))
    batch = StepBatch(
        torch.tensor(tokens, device=device),
        torch.tensor(positions, device=device),
        segments,
        pieces,
        torch.tensor(last, dtype=torch.int64, device=device),
    )
    return Packed(batch, list(work), rows)
