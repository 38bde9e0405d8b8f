"""The adapters of a packed row, in short: where each one's rows end. And the route that lorakit runs for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lorakit.core.route import OFF, Mix, Route, Rows
from lorakit.serve.runner import Segment

Spans = tuple[tuple[int, "str | None"], ...]
"""For each run of rows of one adapter: one past its last row, and the adapter's digest (None is the base)."""


def spans_of(segments: Sequence[Segment]) -> Spans:
    """Of a whole row."""
    return tuple((s.end, None if s.version is None else s.version.digest) for s in segments)


def of_rows(spans: Spans, rows: Tensor) -> Spans:
    """Of some of the rows alone, ``(n,)`` ascending."""
    ends = torch.tensor([end for end, _ in spans])
    counts = torch.searchsorted(rows.cpu(), ends).tolist()  # rows before the end of each
    kept: list[tuple[int, str | None]] = []
    for count, (_, digest) in zip(counts, spans, strict=True):
        if count > (kept[-1][0] if kept else 0):
            kept.append((count, digest))
    return tuple(kept)


def only(spans: Spans, digests: Collection[str]) -> Spans:
    """Only these adapters told apart; everything else counts as the base."""
    kept: list[tuple[int, str | None]] = []
    for end, digest in spans:
        acting = digest if digest in digests else None
        if kept and kept[-1][1] == acting:
            kept.pop()
        kept.append((end, acting))
    return tuple(kept)


def route_of(spans: Spans) -> Route:
    """What `lorakit.use` is given for a row."""
    if not spans:
        return OFF
    mixes = [OFF if digest is None else Mix(((digest, 1.0),)) for _, digest in spans]
    if len(mixes) == 1:
        return mixes[0]
    starts = [0, *(end for end, _ in spans)]
    if len(set(mixes)) < len(mixes):  # the base in several places
        return _scattered(mixes, starts)
    groups = tuple((mix, slice(a, b)) for mix, a, b in zip(mixes, starts, starts[1:], strict=False))
    index = tuple(i for i, (_, rows) in enumerate(groups) for _ in range(rows.start, rows.stop))
    return Rows(tuple(mixes), index, groups)


def _scattered(mixes: list[Mix], starts: list[int]) -> Route:
    names = [
        mix.weights[0][0] if mix.weights else None
        for mix, a, b in zip(mixes, starts, starts[1:], strict=False)
        for _ in range(b - a)
    ]
    return Rows.of(names)
