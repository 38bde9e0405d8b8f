"""Train an adapter as a recipe says, and leave its files in the output folder."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from lorakit.attach import detach
from lorakit.errors import ConfigError
from lorakit.garbage import seldom_collected
from lorakit.train.activation_checkpointing import checkpoint_activations, wants_checkpointing
from lorakit.train.arguments import arguments, without_printing
from lorakit.train.around_batches import around_batches
from lorakit.train.attaching import attach_all, processes_of, trained_parameters
from lorakit.train.batches import shared_out
from lorakit.train.best import best_of
from lorakit.train.distributed import World, join, shard
from lorakit.train.fused_layers import fused_layers
from lorakit.train.head_loss import separable_head
from lorakit.train.heap import kept_heap
from lorakit.train.loss import NEXT_TOKEN
from lorakit.train.progress import Progress, Silent
from lorakit.train.quantized_base import check_handed_in, quantize_base
from lorakit.train.recipe import Recipe
from lorakit.train.row_set import Row
from lorakit.train.run_files import (
    MetricsFile,
    checkpoint_to_resume,
    plot_loss,
    read_metrics,
    read_run,
    rows_hash,
    run_record,
    what_changed,
    write_json,
)
from lorakit.train.saving import Writer, check_free, clear
from lorakit.train.task import Task
from lorakit.train.tasks import task_of
from lorakit.train.tracker_packages import check_installed
from lorakit.train.train_result import TrainResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.plan import Plan
    from lorakit.train.reporting import Reporting


def train(
    recipe: Recipe,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train an adapter as a recipe says.

    Args:
        recipe: From `Recipe.from_file` or `Recipe.from_mapping`.
        model: The base model, if it is loaded already; the adapter is attached to it.
        tokenizer: Its tokenizer, if it is loaded already.
        resume: Go on from the last checkpoint in the output folder, bit for bit as if the run had not been stopped.
        overwrite: Start anew in an output folder that holds a run.
        progress: Whom to tell; by default nobody.

    Returns:
        What was done, with the model.

    Raises:
        ConfigError: The recipe asks for something impossible, or the output folder holds another run.
        DataError: A data file is missing, empty or malformed.
        TrainingError: The loss or a gradient became infinite or NaN, or there is nothing to resume.
        OutOfMemoryError: Memory ran out; the message says what to change.
        MissingDependencyError: A tracker of ``train.report_to`` is not installed.
    """
    gc.collect()  # an earlier run's model may be part of a cycle, and must not stay beside this one's
    with ExitStack() as during, ExitStack() as starting:
        starting.enter_context(seldom_collected())
        return _train(recipe, model, tokenizer, resume, overwrite, progress, during, starting)


def _train(
    recipe: Recipe,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
    during: ExitStack,
    starting: ExitStack,
) -> TrainResult:
    """See `train`; ``during`` holds what must be undone when the run is over, ``starting`` before its first step."""
    world = join(model)
    progress = progress if progress is not None and world.is_main else Silent()
    folder = recipe.output
    if not resume:
        check_free(folder, overwrite)
    settings = recipe.train
    check_installed(settings.report_to)
    task = task_of(recipe)
    resolved = task.resolve() if model is None else recipe.model.name
    if tokenizer is None:
        tokenizer = task.tokenizer(resolved)
    rows = task.rows(tokenizer, "train")
    progress.say(f"train: {rows}")
    valid = task.rows(tokenizer, "valid") if task.has_split("valid") else None
    if valid is not None:
        progress.say(f"valid: {valid}")
    best = best_of(settings, task.measures, has_valid=valid is not None)
    data_hash = rows_hash(rows.rows, task.info().get("labels", ()))
    checkpoint = checkpoint_to_resume(folder, recipe.plain(), data_hash) if resume else None
    start = None
    if model is None:
        model = task.load(resolved)
        told, start = quantize_base(model, recipe, task.head)
        if told is not None:
            progress.say(told)
    else:
        check_handed_in(model, recipe)
        task.accept(model)
    task.check_length(model, rows.rows)
    collator, reason = task.collator(model, tokenizer)
    if reason is not None:
        progress.say(f"batches are padded: {reason}")
    learnt = task.prepared(model, rows.rows, collator)
    measured = () if valid is None else task.prepared(model, valid.rows, collator)
    batches = task.batches(learnt, collator.padded)
    rounds = _shared_out(task, learnt, batches, world)
    steps = -(-len(batches) // settings.accumulation)
    reports, learners = attach_all(task, model, start, learnt, batches, collator)
    for name, report in reports.items():
        progress.say(str(report) if len(reports) == 1 else f"{name}: {report}")
    for part in task.parts:
        warning = part.warning(model, tokenizer)
        if warning is not None:
            progress.say(warning)
    beside = processes_of(task, model, learners)
    device = next(model.parameters()).device
    during.enter_context(kept_heap(device.type == "cpu"))
    if settings.fused and not settings.compile:
        during.enter_context(fused_layers(model, packs=not collator.padded))
    if task.objective is NEXT_TOKEN:
        separable_head(model)  # a probe, which must come before anything stands in the model's way
    around = around_batches(task, model, learnt, rounds, collator, progress, world)
    world.check_same("the recipe or the training data", (recipe.plain(), data_hash, str(checkpoint)))
    world.copy_from_main(trained_parameters(model, learners))
    if world.shards:
        progress.say(shard(model, world))
    folder.mkdir(parents=True, exist_ok=True)
    if world.is_main and not resume:
        clear([folder, *(part.recipe.output for part in task.parts)])
    done = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    if checkpoint is not None:
        progress.say(f"resuming after step {done} of {steps}")
        changed = what_changed(read_run(folder) or {}, world.size)
        if changed:
            told = "; ".join(changed)
            progress.say(f"the last digits may differ from those of an uninterrupted run: {told}")
    record = {
        **run_record(recipe, rows, data_hash, steps, list(reports.values())),
        "info": dict(task.info()),
        "processes": world.size,
    }
    if world.is_main:
        write_json(folder / "run.json", record)

    from lorakit.train.gradient_watch import GradientWatch
    from lorakit.train.loop import AdapterTrainer, finish_on_interrupt
    from lorakit.train.out_of_memory import explained
    from lorakit.train.processes import Processes
    from lorakit.train.reporting import Reporting
    from lorakit.train.trackers import telling, tracking

    leaving = [partial(part.leave, tokenizer=tokenizer) for part in task.parts]
    recipes = [part.recipe for part in task.parts]
    writer = Writer(model, recipes, reports, record, leaving, writes=world.is_main)
    told_to = during.enter_context(tracking(settings.report_to if world.is_main else [], folder))
    reporting = Reporting(
        MetricsFile(folder / "metrics.jsonl", keep_steps=done, writes=world.is_main),
        progress,
        log_every=settings.log_every,
        eval_every=settings.eval_every,
        max_seconds=settings.max_seconds,
        tokens=[sum(learnt[i].length for share in shares for i in share) for shares in rounds],
        unit=task.objective.unit,
        reads=task.objective.reads,
        measure=None if valid is None else lambda: task.measure(model, measured, collator),
        adapters=list(reports) if len(reports) > 1 else (),
        best=best,
        keep=partial(writer.keep, folder),
        tell=telling(told_to, model) if told_to else None,
        device=device,
        world=world,
        begun=starting.close,
    )
    watch = GradientWatch(model, reports, progress.say)
    trainer = AdapterTrainer(
        model,
        arguments(settings, folder, steps, model, clip=len(learners) == 1, processes=world.size),
        learnt,
        rounds,
        collator,
        task.objective,
        settings,
        learners,
        reporting,
        Processes(beside),
        world,
        around,
    )
    without_printing(trainer)
    for callback in (*told_to, watch):
        trainer.add_callback(callback)
    bill = partial(_bill, task, model, learnt, batches, padded=collator.padded)
    checkpointing = wants_checkpointing(settings.activation_checkpointing, bill, device, progress.say)
    if world.size > 1:  # all or none: FSDP's processes meet in every layer
        checkpointing = any(world.total([float(checkpointing)]))
    if checkpointing:
        checkpoint_activations(model, True)
    try:
        with (
            finish_on_interrupt(reporting.interrupted, progress),
            explained(bill),
            warnings.catch_warnings(),
        ):
            # torch asks for `optimizer.step()` first when a resumed scheduler is loaded; it was called
            # before the stop.
            warnings.filterwarnings(
                "ignore", message="Detected call of `lr_scheduler.step", category=UserWarning
            )
            if checkpoint is None or not trainer.is_over(checkpoint, done):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except BaseException as error:
        ended = {"how": "error", "error": f"{type(error).__name__}: {error}"}
        if world.is_main:
            write_json(folder / "run.json", {**record, "ended": ended})
        for name in reports:
            detach(model, name)  # a model that was handed in goes back as it came
        raise
    finally:
        model.eval()
        if checkpointing:
            checkpoint_activations(model, False)
    world.wait()  # for the last line of the main process
    result = _finish(task, writer, tokenizer, reporting, watch.silent)
    if world.is_main:
        write_json(folder / "run.json", {**record, "ended": result.plain()})
    world.wait()  # until the adapter is there
    return result


def _finish(
    task: Task,
    writer: Writer,
    tokenizer: PreTrainedTokenizerBase,
    reporting: Reporting,
    silent: tuple[str, ...],
) -> TrainResult:
    """Save the adapters and draw the loss."""
    recipe, folder, reports = task.recipe, task.recipe.output, writer.reports
    metrics = read_metrics(folder / "metrics.jsonl")
    valid_losses = [line["valid_loss"] for line in metrics if "valid_loss" in line]
    outcome = {
        "step": len(reporting.losses),
        "loss": reporting.losses[-1],
        "valid_loss": valid_losses[-1] if valid_losses else None,
    }
    adapters = writer.write("adapter", outcome)
    called = f"adapter {next(iter(adapters))!r}" if len(adapters) == 1 else f"{len(adapters)} adapters"
    best = reporting.best
    return TrainResult(
        folder=folder,
        adapters=adapters,
        steps=len(reporting.losses),
        seconds=reporting.seconds,
        tokens=reporting.tokens_read,
        reads=reporting.reads,
        learnt_tokens=reporting.tokens_learnt,
        losses=tuple(reporting.losses),
        losses_of=reporting.losses_of,
        valid_loss=outcome["valid_loss"],
        stopped_by=reporting.stopped_by,
        best=None if best is None or best.value is None else best.plain(),
        silent=silent,
        reports=reports,
        plot=plot_loss(metrics, folder / "loss.png", f"{recipe.model.name}, {called}", task.objective.unit)
        if writer.writes
        else None,
        model=writer.model,
        tokenizer=tokenizer,
    )


# ---- the parts of train
def _shared_out(
    task: Task, rows: Sequence[Row], batches: Sequence[list[int]], world: World
) -> list[list[list[int]]]:
    """The rows of each process.

    Raises:
        ConfigError: The loss compares the rows of a batch, and a step has too few batches for the processes.
    """
    accumulation, joint = task.recipe.train.accumulation, task.objective.joint
    if joint and accumulation % world.size:
        raise ConfigError(
            f"The loss of task: {task.recipe.task} compares the rows of a batch with each other, so a batch cannot be "
            f"dealt out to {world.size} processes: set train.accumulation to a multiple of {world.size} (it is "
            f"{accumulation}), which gives each process whole batches."
        )
    lengths = [row.length for row in rows]
    return shared_out(batches, lengths, accumulation=accumulation, processes=world.size, whole=joint)


def _bill(
    task: Task,
    model: PreTrainedModel,
    rows: Sequence[Row],
    batches: Sequence[Sequence[int]],
    *,
    padded: bool,
) -> Plan:
    """What the planner says that the run needs."""
    from lorakit.train.estimating import batch_shape, live_architecture
    from lorakit.train.task_plan import task_plan

    shape = batch_shape(rows, batches, task.recipe.train.accumulation, packed=not padded)
    return task_plan(task, live_architecture(model), shape)
