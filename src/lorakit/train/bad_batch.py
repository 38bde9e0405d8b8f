"""What a run leaves of the batch at which its loss or its gradient stopped being finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lorakit.train.row_set import Row
from lorakit.train.run_files import write_json

TENSORS = "bad_batch.safetensors"
RECORD = "bad_batch.json"


def write_bad_batch(
    folder: Path,
    *,
    step: int,
    what: str,
    numbers: Sequence[Sequence[int]],
    rows: Sequence[Row],
    batches: Sequence[Mapping[str, Tensor]],
) -> Path:
    """Write which rows a batch was made of, and its tensors.

    Args:
        folder: Of the run.
        step: The step that went wrong, counted from 1.
        what: What was not finite, and its value.
        numbers: For each batch the numbers of its rows in the training split, from 0.
        rows: All rows, which know their own names.
        batches: What the collator made of them; several where the gradient of a whole step went wrong.

    Returns:
        The record, beside which the tensors lie.
    """
    named = [
        [{"row": number, "id": rows[number].id, "length": rows[number].length} for number in batch]
        for batch in numbers
    ]
    tensors = {
        name if len(batches) == 1 else f"{i}.{name}": tensor.detach().cpu().contiguous().clone()
        for i, batch in enumerate(batches)
        for name, tensor in batch.items()
    }
    save_file(tensors, folder / TENSORS)
    write_json(folder / RECORD, {"step": step, "what": what, "batches": named, "tensors": TENSORS})
    return folder / RECORD
