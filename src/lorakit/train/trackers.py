"""Trackers of experiments, through transformers' own callbacks: what ``metrics.jsonl`` is told, they are told too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.train.tracker_packages import check_installed

Tell = Callable[[Mapping[str, Any], TrainingArguments, TrainerState, TrainerControl], None]


@contextmanager
def tracking(names: Sequence[str], folder: Path) -> Iterator[list[TrainerCallback]]:
    """`trackers` inside a ``with`` block, whose end is the end of the runs that were begun in it.

    transformers leaves a run of Weights & Biases open, and the next one of this process would go on in it. A run that
    the caller has begun stays the caller's.

    Raises:
        MissingDependencyError: A tracker is not installed.
    """
    made = trackers(names, folder)
    ends = [end for name in names if (end := _end_of(name)) is not None]
    failed = True
    try:
        yield made
        failed = False
    finally:
        for end in ends:
            end(failed)


def _end_of(name: str) -> Callable[[bool], None] | None:
    """What ends a tracker's run, told whether it failed; None where it ends by itself, or has begun already."""
    if name not in ("wandb", "mlflow"):
        return None
    library = import_module(name)

    def running() -> Any:
        return library.run if name == "wandb" else library.active_run()

    def end(failed: bool) -> None:
        if running() is None:
            return
        if name == "wandb":
            library.finish(exit_code=int(failed))
        else:
            library.end_run("FAILED" if failed else "FINISHED")

    return end if running() is None else None


def trackers(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """The callbacks of transformers with these names. TensorBoard's files go to ``folder/tensorboard``.

    Raises:
        MissingDependencyError: A tracker is not installed.
    """
    check_installed(names)
    if not names:
        return []
    from transformers.integrations import get_reporting_integration_callbacks

    made = []
    for name, cls in zip(names, get_reporting_integration_callbacks(list(names)), strict=True):
        callback = cls()
        if name == "tensorboard" and "TENSORBOARD_LOGGING_DIR" not in os.environ:
            callback.logging_dir = str(folder / "tensorboard")
        made.append(callback)
    return made


def telling(callbacks: Sequence[TrainerCallback], model: Any) -> Tell:
    """A function that hands a line of metrics to the trackers, in transformers' names.

    What is measured on the valid split, ``valid_loss``, is ``eval_loss`` there.
    """

    def tell(
        line: Mapping[str, Any], args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        named = {
            name.replace("valid_", "eval_", 1) if name.startswith("valid_") else name: value
            for name, value in line.items()
            if name != "step" and isinstance(value, (int, float))
        }
        for callback in callbacks:
            callback.on_log(args, state, control, logs=dict(named), model=model)

    return tell
