"""What the batches of a run are run in: compiled blocks, or what the frozen part gave for their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

from lorakit.attach import detach
from lorakit.errors import ConfigError
from lorakit.train.collate import Collator
from lorakit.train.compiled_blocks import CompiledBlocks
from lorakit.train.distributed import World
from lorakit.train.frozen_cache import frozen_cache
from lorakit.train.progress import Progress
from lorakit.train.row_set import Row
from lorakit.train.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Around = Callable[[Sequence[int]], AbstractContextManager[None]]
"""From the numbers of a batch's rows to what it is run in, forward and backward."""


def around_batches(
    task: Task,
    model: PreTrainedModel,
    rows: Sequence[Row],
    rounds: Sequence[Sequence[list[int]]],
    collator: Collator,
    progress: Progress,
    world: World,
) -> Around | None:
    """What each batch is run in: with what the frozen part gave, or compiled; on an error the adapters are taken off.

    Raises:
        ConfigError: The run cannot have it.
        MissingDependencyError: There is no compiler.
    """
    settings = task.recipe.train
    try:
        if world.size > 1 and (settings.compile or settings.cache_frozen != "none"):
            raise ConfigError(
                f"train.{'compile' if settings.compile else 'cache_frozen'} is for one process, and here are "
                f"{world.size}: leave it out."
            )
        if settings.compile:
            progress.say("compiling block by block: the first steps take minutes")
            return CompiledBlocks(model).running
        if settings.cache_frozen == "none":
            return None
        return frozen_cache(
            model,
            rows,
            [row for shares in rounds for share in shares for row in share],
            collator,
            task.objective,
            settings,
            task.recipe.output,
            progress.say,
            partial(progress.answered, what="frozen part"),
        ).giving
    except BaseException:
        for part in task.parts:
            detach(model, part.recipe.adapter.name)
        raise
