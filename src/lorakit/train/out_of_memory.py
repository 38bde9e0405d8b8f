"""When memory runs out: which part of it is largest, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lorakit.errors import OutOfMemoryError
from lorakit.plan import Plan
from lorakit.train.estimating import advice, terms

_SAID = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "unable to mmap")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: Python's own, torch's, or a RuntimeError of torch's CPU allocator."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAID)


@contextmanager
def explained(bill: Callable[[], Plan | None]) -> Iterator[None]:
    """Turn an out-of-memory error of the block into one that says what to change.

    Args:
        bill: Asks the planner for what the run needs; None where it cannot tell. Called only after such an error.

    Raises:
        OutOfMemoryError: In place of the error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(explain(error, _asked(bill))) from error


def explain(error: BaseException, planned: Plan | None) -> str:
    """The message: what was asked for, the largest terms, and what to change."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if planned is None or planned.training is None:
        return (
            f"Memory ran out ({first}). Use a smaller train.batch_rows with more train.accumulation, which learns the "
            "same; train.activation_checkpointing: true; or model.quantize: nf4."
        )
    (largest, size), *others = terms(planned)
    rest = ", ".join(f"{name} {_gigabytes(count)}" for name, count in others[:2])
    run = planned.run
    ways = "\n".join(f"  - {line}" for line in advice(planned)[:3])
    return (
        f"Memory ran out ({first}).\nFor a batch of {run.batch} rows, {run.batch * run.length:,} tokens, the plan is "
        f"{_gigabytes(planned.training.total)}: {largest} {_gigabytes(size)}, the largest, then {rest}.\n"
        f"What helps most:\n{ways}\nThe last checkpoint, where there is one, is untouched; lorakit estimate tells the "
        "effect of a setting beforehand."
    )


def _asked(bill: Callable[[], Plan | None]) -> Plan | None:
    try:
        return bill()
    except Exception:  # the planner must not hide that memory ran out
        return None


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
