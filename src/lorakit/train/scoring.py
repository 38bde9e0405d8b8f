"""What scoring has in common whatever the task: an adapter put on for a while, and rows run through in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakit.attach import detach, use
from lorakit.io.model_files import load
from lorakit.train.batches import plan_batches
from lorakit.train.collate import Collator
from lorakit.train.for_a_while import in_eval_mode
from lorakit.train.recipe import TrainSection
from lorakit.train.row_set import R

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "scored"


@contextmanager
def scored(model: PreTrainedModel, adapter: str | Path | None, *, own: bool) -> Iterator[None]:
    """Run the model with a saved adapter inside the block, and take the adapter off afterwards.

    Args:
        model: The base, or a model that carries other adapters.
        adapter: Its folder; None to run the model as it is.
        own: Whether the model was made for this: then the adapter, its only one, acts by default.

    Raises:
        AdapterFileError: The adapter cannot be read, or belongs to another model.
    """
    if adapter is not None:
        load(model, adapter, name=NAME)
    try:
        with nullcontext() if own or adapter is None else use(model, NAME):
            yield
    finally:
        if adapter is not None:
            detach(model, NAME)


def run_batches(
    model: PreTrainedModel,
    rows: Sequence[R],
    collator: Collator,
    settings: TrainSection,
    step: Callable[[list[int], Mapping[str, Tensor]], None],
    told: Callable[[int, int], None] | None = None,
) -> None:
    """Call ``step`` with the numbers of some rows and their batch, for all rows, in eval mode and without gradients.

    The model's train/eval mode is put back.

    Args:
        model: With whatever adapters act.
        rows: What to run.
        collator: Makes the batches; where it pads, rows of like length stand together.
        settings: For the size of the batches.
        step: Takes a batch on the model's device.
        told: Called with the rows done and their number.
    """
    batches = plan_batches(
        [row.length for row in rows],
        rows=settings.batch_rows or (None if settings.batch_tokens else 16),
        tokens=settings.batch_tokens,
        epochs=1,
        seed=0,
        padded=collator.padded,
    )
    done = 0
    device = next(model.parameters()).device
    with in_eval_mode(model), torch.no_grad():
        for numbers in batches:
            made = collator([rows[i] for i in numbers])
            step(numbers, {name: tensor.to(device) for name, tensor in made.items()})
            done += len(numbers)
            if told is not None:
                told(done, len(rows))


def outputs(
    model: PreTrainedModel,
    rows: Sequence[R],
    collator: Collator,
    settings: TrainSection,
    of: Callable[[Mapping[str, Tensor]], Tensor],
    told: Callable[[int, int], None] | None = None,
) -> Tensor:
    """What a function of batches gives for each row ``(rows, ...)``, in the order of the rows and on the CPU.

    Args:
        model: See `run_batches`.
        rows: See `run_batches`; at least one.
        collator: See `run_batches`.
        settings: See `run_batches`.
        of: From a batch on the model's device to a tensor with one entry for each of its rows.
        told: See `run_batches`.
    """
    found: dict[int, Tensor] = {}

    def step(numbers: list[int], batch: Mapping[str, Tensor]) -> None:
        found.update(zip(numbers, of(batch).cpu(), strict=True))

    run_batches(model, rows, collator, settings, step, told)
    return torch.stack([found[i] for i in range(len(rows))])
