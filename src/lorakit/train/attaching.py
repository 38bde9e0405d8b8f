"""The adapters of all parts of a run on its model, and what learns of them: all of it is there, or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lorakit.attach import AttachReport, detach, training_processes
from lorakit.attach.attachments import attachments_of
from lorakit.core import AdapterState, TrainingProcess
from lorakit.errors import ConfigError
from lorakit.train.arguments import optimizer_groups
from lorakit.train.collate import Collator
from lorakit.train.learners import Learner, parameters_of
from lorakit.train.model_card import public_name
from lorakit.train.row_set import Row
from lorakit.train.starts import Batch, attach_adapter
from lorakit.train.task import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def attach_all(
    task: Task,
    model: PreTrainedModel,
    start: AdapterState | None,
    rows: Sequence[Row],
    batches: Sequence[Sequence[int]],
    collator: Collator,
) -> tuple[dict[str, AttachReport], list[Learner]]:
    """Put the adapters of all parts on the model; on an error none of them.

    Args:
        task: Of the run.
        model: The base.
        start: LoftQ's adapter, where there is one.
        rows: What is learnt.
        batches: The batches of the whole run, as lists of row numbers.
        collator: Makes their tensors, for starts that are measured.

    Returns:
        What was attached, by the adapter's name, and how long each adapter learns.

    Raises:
        ConfigError: An adapter has nothing to train, or does not suit the task.
        TargetError: A target was not found.
    """
    reports: dict[str, AttachReport] = {}
    learners = []
    try:
        for part in task.parts:
            section, settings = part.recipe.adapter, part.recipe.train
            own = [mine for batch in batches if (mine := task.rows_of(part, [rows[i] for i in batch]))]
            first = partial(map, task.collator_of(part, collator), own[: section.start_batches])
            reports[section.name] = _attach(part, model, start, first)
            steps = -(-len(own) // settings.accumulation)
            learners.append(Learner(section.name, steps, settings.lr))
    except BaseException:
        for name in reports:
            detach(model, name)
        raise
    return reports, learners


def _attach(
    task: Task, model: PreTrainedModel, start: AdapterState | None, batches: Callable[[], Iterable[Batch]]
) -> AttachReport:
    section, settings = task.recipe.adapter, task.recipe.train
    adapter, targets = task.adapter(model)
    report = attach_adapter(
        model,
        adapter,
        targets,
        name=section.name,
        exclude=section.exclude,
        seed=settings.seed_of("init"),
        start=start,
        batches=batches,
        objective=task.objective,
    )
    try:
        if not report.trainable:
            raise ConfigError("The adapter has nothing to train.")
        task.check(model, report)
    except ConfigError:
        detach(model, section.name)
        raise
    attached = attachments_of(model).adapter(section.name)
    # Written into the adapter's files: the model's public name rather than a folder of this machine's cache.
    base = public_name(task.recipe.model.name)
    attached.spec = dataclasses.replace(attached.spec, base=base, info={**attached.spec.info, **task.info()})
    return report


def processes_of(task: Task, model: PreTrainedModel, learners: Sequence[Learner]) -> list[TrainingProcess]:
    """What runs along; whatever does not fit the model or the number of steps is told before anything is written.

    Raises:
        ConfigError: It does not fit; the adapters are then off the model again.
    """
    try:
        optimizer_groups(task.recipe.train, model)
        found = {
            learner.name: training_processes(model, learner.name, total_steps=learner.steps)
            for learner in learners
        }
        most = max(learner.steps for learner in learners)
        early = [learner for learner in learners if found[learner.name] and learner.steps < most]
        if early:
            raise ConfigError(
                f"The method of the adapter {early[0].name!r} follows the steps of the whole run, but its own data "
                f"last for {early[0].steps} of {most} steps: set train.max_steps, which holds for all adapters, or "
                "train it alone."
            )
        return [process for name in found for process in found[name]]
    except ConfigError:
        for learner in learners:
            detach(model, learner.name)
        raise


def trained_parameters(model: PreTrainedModel, learners: Sequence[Learner]) -> list[Tensor]:
    """What is trained, each tensor once."""
    return list(dict.fromkeys(p for learner in learners for p in parameters_of(model, learner.name)))
