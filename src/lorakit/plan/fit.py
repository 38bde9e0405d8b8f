"""What fits: for a limit of memory, the largest batch for each length and way of training, and a proposal."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.core.method import Method
from lorakit.core.selection import Selector
from lorakit.errors import ConfigError
from lorakit.plan.architectures import Architecture, architecture
from lorakit.plan.counting import Counts, count
from lorakit.plan.memory import Weights, dtype_called, weights
from lorakit.plan.plan import Run, rehearse, train_step, training_memory
from lorakit.plan.rehearsal import Rehearsal, Step

MARGIN = 0.1
"""The share of the limit that is left free: a plan is meant to be within a tenth of what is measured."""
RANKS = (64, 32, 16, 8, 4)
LENGTHS = (256, 512, 1024, 2048, 4096)
WAYS: tuple[Mapping[str, Any], ...] = (
    {"storage": "dense", "checkpointing": False},
    {"storage": "dense", "checkpointing": True},
    {"storage": "nf4", "checkpointing": False},
    {"storage": "nf4", "checkpointing": True},
)
"""Ways of training, the fastest first."""
_MOST = 1024

_UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


@dataclass(frozen=True)
class Option:
    """One way that fits, or does not.

    Attributes:
        run: With the largest batch that fits; with a batch of 1 when none does.
        total: Bytes at the peak.
        fits: Whether a batch of 1 fits.
    """

    run: Run
    total: int
    fits: bool


@dataclass(frozen=True)
class Fit:
    """An answer to "what fits?".

    Attributes:
        limit: Bytes.
        usable: The limit without the margin.
        method: With the rank that is proposed.
        proposal: The first way, longest length that fits; None when nothing does.
        options: All that were looked at.
    """

    limit: int
    usable: int
    method: Method
    proposal: Option | None
    options: tuple[Option, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""

        def words(option: Option) -> dict[str, Any]:
            run = option.run
            return {
                "storage": run.storage, "checkpointing": run.checkpointing, "length": run.length,
                "batch": run.batch if option.fits else 0, "total": option.total,
            }  # fmt: skip

        return {
            "limit": self.limit,
            "usable": self.usable,
            "method": self.method.to_json(),
            "proposal": None if self.proposal is None else words(self.proposal),
            "options": [words(option) for option in self.options],
        }


def size_of(text: str) -> int:
    """``"24GB"`` or ``"22.5GiB"`` in bytes.

    Raises:
        ConfigError: It is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{text!r} is no size of memory: write it as 24GB, 22.5GiB or 800MB.")
    return round(float(match[1]) * _UNITS[match[2].lower()])


def fit(
    model: str | Path | Architecture,
    method: Method,
    limit: int,
    targets: Selector | None = None,
    *,
    exclude: Selector | None = None,
    run: Run | None = None,
    rank: bool = True,
    lengths: Sequence[int] | None = None,
) -> Fit:
    """The largest rank, and for each length and way of training the largest batch, whose peak is within a limit.

    Four rehearsals with and four without checkpointing tell the peak for every batch and length; what is proposed is
    rehearsed as it is.

    Args:
        model: See `architecture`.
        method: A method; if it has a rank ``r`` and ``rank`` is true, the largest of ``RANKS`` that leaves room.
        limit: Bytes.
        targets: What to adapt.
        exclude: What to leave out.
        run: What else is asked; its batch, length, storage and checkpointing are what is looked for.
        rank: Whether ``r`` may be chosen.
        lengths: Which to try; by default powers of two up to 4,096 that the model has positions for.

    Raises:
        ConfigError: The model has no forward pass to rehearse.
    """
    run = run or Run()
    base = model if isinstance(model, Architecture) else architecture(model)
    if not base.runs:
        raise ConfigError(f"{base.name} is a table of layers: what it needs to run is not known.")
    longest = base.longest or max(LENGTHS)
    tried = [n for n in (lengths or LENGTHS) if n <= longest] or [longest]
    usable = round(limit * (1 - MARGIN))
    chosen = _with_rank(base, method, targets, exclude, run, usable) if rank else method
    counts = count(base.model, chosen, targets, exclude)
    rehearsal = rehearse(base, counts, run)
    try:
        peaks = {
            checkpointing: _Peaks(
                rehearsal, dataclasses.replace(run, checkpointing=checkpointing), max(tried)
            )
            for checkpointing in {bool(way["checkpointing"]) for way in WAYS}
        }
        options: list[Option] = []
        for way in WAYS:
            asked = dataclasses.replace(run, **way)
            held = weights(base.model, dtype_called(run.base_dtype), asked.storage)
            known = peaks[asked.checkpointing]
            options += [
                _largest(counts, held, known, dataclasses.replace(asked, length=n), usable) for n in tried
            ]
        return Fit(limit, usable, chosen, _proposed(options, counts, base, rehearsal, usable), tuple(options))
    finally:
        rehearsal.close()


class _Peaks:
    """The peak of a step for any batch and length, from four rehearsals: ``a + batch (b + c length + d length^2)``.

    That is the form of every transformer: what a row needs grows with its length, and with its square where attention
    keeps its probabilities.
    """

    def __init__(self, rehearsal: Rehearsal, run: Run, longest: int) -> None:
        half, quarter = max(1, longest // 2), max(1, longest // 4)
        points = ((1, longest), (2, longest), (1, half), (1, quarter))
        rows = [[1, batch, batch * n, batch * n * n] for batch, n in points]
        found = [train_step(rehearsal, dataclasses.replace(run, batch=b, length=n)).peak for b, n in points]
        solved = torch.linalg.lstsq(
            torch.tensor(rows, dtype=torch.float64), torch.tensor(found, dtype=torch.float64)
        )
        self.terms = solved.solution.tolist()

    def at(self, batch: int, length: int) -> int:
        """Bytes."""
        a, b, c, d = self.terms
        return round(a + batch * (b + c * length + d * length**2))


def _largest(counts: Counts, held: Weights, peaks: _Peaks, run: Run, usable: int) -> Option:
    """The largest batch of rows of one length that fits."""

    def total(batch: int) -> int:
        return training_memory(counts, held, run, Step(peaks.at(batch, run.length), 0)).total

    if total(1) > usable:
        return Option(dataclasses.replace(run, batch=1), total(1), False)
    low, high = 1, _MOST + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= usable else (low, middle)
    return Option(dataclasses.replace(run, batch=low), total(low), True)


def _proposed(
    options: Sequence[Option], counts: Counts, base: Architecture, rehearsal: Rehearsal, usable: int
) -> Option | None:
    """The proposal, rehearsed as it is; its batch is made smaller where that was too much."""
    option = _proposal(options)
    while option is not None:
        run = option.run
        held = weights(base.model, dtype_called(run.base_dtype), run.storage)
        option = Option(run, training_memory(counts, held, run, train_step(rehearsal, run)).total, True)
        if option.total <= usable:
            return option
        if run.batch == 1:
            return None
        option = dataclasses.replace(option, run=dataclasses.replace(run, batch=max(1, run.batch * 9 // 10)))
    return None


def _with_rank(
    base: Architecture,
    method: Method,
    targets: Selector | None,
    exclude: Selector | None,
    run: Run,
    usable: int,
) -> Method:
    """The method with the largest rank whose adapter, gradients and means take less than a tenth of the memory.

    Ranks that some target cannot have are passed over.
    """
    if not any(field.name == "r" for field in dataclasses.fields(method)):  # type: ignore[arg-type]
        return method
    for r in RANKS:
        tried: Method = dataclasses.replace(method, r=r)  # type: ignore[type-var]
        try:
            counts = count(base.model, tried, targets, exclude)
        except ConfigError:
            if r == RANKS[-1]:
                raise
            continue
        size = dtype_called(run.adapter_dtype).itemsize
        if size * (counts.stored + 3 * counts.trainable) <= usable / 10:
            return tried
    return tried


def _proposal(options: Sequence[Option]) -> Option | None:
    """The first way in which half of the longest length or more fits, with the longest length there; else what fits."""
    fitting = [option for option in options if option.fits]
    if not fitting:
        return None
    longest = max(option.run.length for option in options)
    enough = [option for option in fitting if 2 * option.run.length >= min(longest, 2048)]
    first = (enough or fitting)[0].run
    same = [
        option
        for option in fitting
        if (option.run.storage, option.run.checkpointing) == (first.storage, first.checkpointing)
    ]
    return max(same, key=lambda option: (min(option.run.length, 2048), -option.run.length))
