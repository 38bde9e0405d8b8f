"""Which rows stand together in a batch, planned for the whole run before it starts.

Because the plan follows from the lengths and the seed alone, the number of steps is exact, and a resumed run takes up
the plan where it was left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from lorakit.train.recipe import TrainSection
from lorakit.train.row_set import Row

_POOL = 50  # batches among which rows are sorted by length, where they are padded


def plan_batches(
    lengths: Sequence[int],
    *,
    rows: int | None,
    tokens: int | None,
    epochs: float,
    seed: int,
    padded: bool,
    most: int | None = None,
) -> list[list[int]]:
    """The batches of a run, as lists of row numbers.

    Args:
        lengths: Tokens of each row.
        rows: Most rows of a batch.
        tokens: Most tokens of a batch, padding included; a single longer row is a batch alone.
        epochs: How often each row comes; a fraction takes the first part of the last pass.
        seed: Of the order.
        padded: Whether rows are padded to the longest of their batch: then rows of like length are put together,
            and the order of the batches is drawn.
        most: Stop after so many batches.
    """
    batches: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(len(lengths), generator=generator).tolist()
        share = min(1.0, epochs - epoch)
        order = order[: max(1, round(share * len(order)))]
        if padded:
            order = _sorted_in_pools(order, lengths, rows, tokens)
        found = list(_cut(order, lengths, rows, tokens, padded))
        if padded:
            found = [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]
        batches += found
        if most is not None and len(batches) >= most:
            return batches[:most]
    return batches


def _sorted_in_pools(
    order: list[int], lengths: Sequence[int], rows: int | None, tokens: int | None
) -> list[int]:
    mean = sum(lengths) / len(lengths)
    batch = min(rows or len(order), (tokens or math.inf) / mean)
    size = max(1, math.ceil(_POOL * batch))
    pools = (order[start : start + size] for start in range(0, len(order), size))
    return [row for pool in pools for row in sorted(pool, key=lambda r: lengths[r])]


def _cut(
    order: Sequence[int], lengths: Sequence[int], rows: int | None, tokens: int | None, padded: bool
) -> Iterator[list[int]]:
    batch: list[int] = []
    total = longest = 0
    for row in order:
        length = lengths[row]
        cost = max(longest, length) * (len(batch) + 1) if padded else total + length
        full = (rows is not None and len(batch) == rows) or (tokens is not None and cost > tokens)
        if batch and full:
            yield batch
            batch, total, longest = [], 0, 0
        batch.append(row)
        total, longest = total + length, max(longest, length)
    if batch:
        yield batch


def plan_run(settings: TrainSection, rows: Sequence[Row], padded: bool) -> list[list[int]]:
    """The batches of a run on some rows, as its recipe says; see `plan_batches`."""
    per_batch = settings.batch_rows or (None if settings.batch_tokens else 16)
    most = None if settings.max_steps is None else settings.max_steps * settings.accumulation
    # Each pass has at least one batch, so this many passes are enough for the steps.
    epochs = float(most) if most is not None else settings.epochs or 3.0
    return plan_batches(
        [row.length for row in rows],
        rows=per_batch,
        tokens=settings.batch_tokens,
        epochs=epochs,
        seed=settings.seed_of("data"),
        padded=padded,
        most=most,
    )


def shared_out(
    batches: Sequence[list[int]],
    lengths: Sequence[int],
    *,
    accumulation: int,
    processes: int,
    whole: bool = False,
) -> list[list[list[int]]]:
    """The batches that several processes take at a time; each optimizer step has the rows that it has in one process.

    As many batches of a step are taken at once as there are processes, one each. Where fewer are left, their rows are
    dealt out.

    Args:
        batches: The plan for one process.
        lengths: Tokens of each row.
        accumulation: Batches of an optimizer step.
        processes: How many share the work.
        whole: Never deal out the rows of a batch, because its loss compares them with each other.

    Returns:
        For each round the rows of each process; a process for which none are left has an empty list.
    """
    rounds: list[list[list[int]]] = []
    for step in range(0, len(batches), accumulation):
        last = min(step + accumulation, len(batches))
        for first in range(step, last, processes):
            taken = batches[first : min(first + processes, last)]
            if whole or len(taken) == processes:
                rounds.append([*taken, *([] for _ in range(processes - len(taken)))])
            else:
                rounds.append(_dealt_out([row for batch in taken for row in batch], lengths, processes))
    return rounds


def _dealt_out(rows: Sequence[int], lengths: Sequence[int], processes: int) -> list[list[int]]:
    """The longest row first, each to the process that has the fewest tokens so far."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for place in sorted(range(len(rows)), key=lambda i: -lengths[rows[i]]):
        process = tokens.index(min(tokens))
        shares[process].append(place)
        tokens[process] += lengths[rows[place]]
    return [[rows[place] for place in sorted(share)] for share in shares]


class PlannedBatches(Sampler[list[int]]):
    """The plan as what a ``DataLoader`` takes for ``batch_sampler``."""

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self.batches = batches
        self.batch_size = max((len(batch) for batch in batches), default=1)
        self.drop_last = False

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
