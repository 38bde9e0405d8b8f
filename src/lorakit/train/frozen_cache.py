"""What the blocks below the lowest adapter give for each row, computed once.

Where only the upper blocks of a model are adapted, every pass over the data runs the lower ones on the same rows to the
same end. Here they run once, before the first step; what the last of them gives for each row is kept, and every step
begins there. That is exact: a row's values do not depend on the rows beside it (packed rows attend to themselves alone,
padding is masked), and a model in which something below is random or adapted is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError
from lorakit.train.collate import Collator
from lorakit.train.for_a_while import in_eval_mode
from lorakit.train.free_space import free_disk, memory
from lorakit.train.frozen_part import LEAVE_OUT, Batch, FrozenPart, examine, run_to_its_end
from lorakit.train.loss import Objective
from lorakit.train.recipe import TrainSection
from lorakit.train.row_set import Row
from lorakit.train.scoring import run_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "frozen_part.bin"
Told = Callable[[int, int], None]


class FrozenCache:
    """What the frozen part gives for each row."""

    def __init__(
        self,
        part: FrozenPart,
        lengths: Mapping[int, int],
        values: Tensor,
        *,
        padded: bool,
        device: torch.device,
    ) -> None:
        """An empty cache.

        Args:
            part: Of the model.
            lengths: The tokens of each row, by its number.
            values: ``(tokens of all rows, d)``: where it is kept.
            padded: Whether batches are padded, or packed.
            device: Of the model.
        """
        self.part, self.values, self.padded, self.device = part, values, padded, device
        starts = accumulate(lengths.values(), initial=0)
        self._places = {
            row: (start, length) for (row, length), start in zip(lengths.items(), starts, strict=False)
        }

    def keep(self, rows: Sequence[int], hidden: Tensor) -> None:
        """Keep what the frozen part gave for a batch ``(B, T, d)`` of some rows."""
        lengths = [self._places[row][1] for row in rows]
        each = [hidden[i, :n] for i, n in enumerate(lengths)] if self.padded else hidden[0].split(lengths)
        for row, own in zip(rows, each, strict=True):
            start, length = self._places[row]
            self.values[start : start + length].copy_(own)

    def hidden(self, rows: Sequence[int]) -> Tensor:
        """What the frozen part gives for a batch of some rows, ``(B, T, d)``; zeros where it is padded."""
        each = [self.values[start : start + length] for start, length in (self._places[row] for row in rows)]
        made = nn.utils.rnn.pad_sequence(each, batch_first=True) if self.padded else torch.cat(each)[None]
        return made.to(self.device)

    def giving(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        """Inside the block the model runs a batch of these rows without its frozen part."""
        return self.part.giving(self.hidden(rows))

    def fill(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row],
        collator: Collator,
        objective: Objective,
        settings: TrainSection,
        told: Told | None = None,
    ) -> None:
        """Run the frozen part once over all rows that the cache has places for; see `run_batches`."""
        numbers = list(self._places)

        def step(chosen: list[int], batch: Batch) -> None:
            given = run_to_its_end(self.part, model, batch, objective)
            self.keep([numbers[i] for i in chosen], given[0] if self.part.in_tuple else given)

        run_batches(model, [rows[i] for i in numbers], collator, settings, step, told)


def frozen_cache(
    model: PreTrainedModel,
    rows: Sequence[Row],
    read: Sequence[int],
    collator: Collator,
    objective: Objective,
    settings: TrainSection,
    folder: Path,
    say: Callable[[str], None],
    told: Told | None = None,
) -> FrozenCache:
    """Look at the model, tell what will be kept, and run its frozen part once over the rows.

    Args:
        model: With its adapters.
        rows: What is learnt.
        read: The numbers of the rows that the run reads, each as often as it is read.
        collator: Makes their batches.
        objective: Runs the model.
        settings: Says where values are kept, and how large a batch is.
        folder: For a file of values on disk.
        say: Told what is kept and how large it is, before it is made.
        told: Called with the rows that are done and their number.

    Raises:
        ConfigError: Nothing below is frozen, something there is random, or there is no room.
    """
    lengths = {row: rows[row].length for row in sorted(set(read))}
    two = sorted(lengths, key=lambda row: lengths[row])[:2]
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collator([rows[i] for i in two]).items()}
    part, sample = examine(model, batch, objective)
    size = sum(lengths.values()) * sample.shape[-1] * sample.element_size()
    where = "in memory" if settings.cache_frozen == "memory" else f"in {folder}"
    say(
        f"frozen part: {len(part.blocks)} of {part.total} blocks lie below the lowest adapter and are run once; what "
        f"they give for {len(lengths):,} rows takes {size / 1e9:.2f} GB {where}"
    )
    if len(read) == len(lengths):
        say("every row is read only once, so the cache of the frozen part saves nothing in this run")
    free = memory()[1] if settings.cache_frozen == "memory" else free_disk(folder)
    if free and size > free:
        raise ConfigError(
            f"train.cache_frozen needs {size / 1e9:.1f} GB {where}, where {free / 1e9:.1f} GB are free. "
            + (
                "Keep it on disk (train.cache_frozen: disk), or leave it out."
                if where == "in memory"
                else LEAVE_OUT
            )
        )
    values = _room(settings.cache_frozen, (sum(lengths.values()), sample.shape[-1]), sample.dtype, folder)
    cache = FrozenCache(part, lengths, values, padded=collator.padded, device=sample.device)
    cache.fill(model, rows, collator, objective, settings, told)
    _check_exact(model, cache, two, batch, objective)
    return cache


def _check_exact(
    model: PreTrainedModel, cache: FrozenCache, rows: Sequence[int], batch: Batch, objective: Objective
) -> None:
    """The loss of some rows must be what it is without the cache.

    Raises:
        ConfigError: It is not: something goes past the blocks that the cache does not keep.
    """
    try:
        with in_eval_mode(model), torch.no_grad():
            # First from the cache: what goes past the blocks is then that of another batch, or nothing.
            with cache.giving(rows):
                found = objective.summed(model, model, batch).double()
            expected = objective.summed(model, model, batch).double()
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"{type(model).__name__} does not run without its lower blocks ({str(error).splitlines()[0][:120]}). "
            f"{LEAVE_OUT}"
        ) from error
    tolerance = 1e-4 if cache.values.dtype == torch.float32 else 0.05
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
        raise ConfigError(
            f"{type(model).__name__} gives another loss from what its lower blocks gave ({found.sum():.6g} in place of "
            f"{expected.sum():.6g}): more than their vectors goes on to the upper ones. {LEAVE_OUT}"
        )


def _room(where: str, size: tuple[int, int], dtype: torch.dtype, folder: Path) -> Tensor:
    """A tensor in memory, or in a file that is gone when the process ends, however it ends."""
    if where == "memory":
        return torch.empty(size, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    values = torch.from_file(str(path), shared=True, size=size[0] * size[1], dtype=dtype)
    with suppress(
        OSError
    ):  # a system that cannot remove a file in use leaves it to the next run, which writes it anew
        path.unlink()
    return values.view(size)
