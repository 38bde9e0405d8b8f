"""Train an adapter as a recipe says, and leave its files in the output folder."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.attach import AttachReport, detach, training_processes
from lorakit.attach.attachments import attachments_of
from lorakit.core import AdapterState, TrainingProcess
from lorakit.errors import ConfigError
from lorakit.models import BUILTINS
from lorakit.train.arguments import arguments, checkpoint_activations, optimizer_groups, without_printing
from lorakit.train.bad_batch import RECORD, TENSORS
from lorakit.train.batches import shared_out
from lorakit.train.best import best_of
from lorakit.train.collate import Collator
from lorakit.train.distributed import World, join, shard
from lorakit.train.learners import Learner, parameters_of
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
from lorakit.train.saving import Writer, forget_best
from lorakit.train.starts import Batch, attach_adapter
from lorakit.train.task import Task
from lorakit.train.tasks import task_of
from lorakit.train.tracker_packages import check_installed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.plan import Plan
    from lorakit.train.reporting import Reporting


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Attributes:
        folder: The output folder.
        adapters: Name on ``model`` to the folder of each trained adapter; most runs have one.
        steps: Optimizer steps done, those before a resume included.
        seconds: Spent training, without loading and without scoring.
        tokens: Tokens read.
        learnt_tokens: Of these, tokens that were learnt; for a classifier, rows.
        losses: Mean loss over what each step taught, in nats; with several adapters the mean of theirs.
        losses_of: With several adapters each one's own, by name.
        valid_loss: The last one measured, if the recipe names a valid split.
        stopped_by: ``"max_seconds"``, ``"patience"`` or ``"interrupt"`` when the run ended before its last step.
        best: The best measurement on the valid split (its ``metric``, ``value`` and ``step``), where that was watched;
            the adapters of that step are in ``best/``.
        silent: Targets that had no gradient in the first steps.
        reports: What was attached, by the adapter's name.
        plot: The picture of the loss, where matplotlib is installed.
        model: The model with the trained adapter on it, in ``eval()``.
        tokenizer: Its tokenizer.
    """

    folder: Path
    adapters: Mapping[str, Path]
    steps: int
    seconds: float
    tokens: int
    learnt_tokens: int
    losses: tuple[float, ...]
    losses_of: Mapping[str, Sequence[float]]
    valid_loss: float | None
    stopped_by: str | None
    best: Mapping[str, Any] | None
    silent: tuple[str, ...]
    reports: Mapping[str, AttachReport]
    plot: Path | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """The adapter's name on ``model``; the first one's where there are several."""
        return next(iter(self.adapters))

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter; the first one's where there are several."""
        return self.adapters[self.name]

    @property
    def report(self) -> AttachReport:
        """What was attached; of the first adapter where there are several."""
        return self.reports[self.name]

    @property
    def tokens_per_second(self) -> float:
        """Tokens read in a second of training."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def plain(self) -> dict[str, Any]:
        """How the run ended, as JSON can hold it."""
        return {
            "how": self.stopped_by or "finished",
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "tokens": self.tokens,
            "learnt_tokens": self.learnt_tokens,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "last_loss": self.losses[-1],
            "valid_loss": self.valid_loss,
            "best": self.best,
            **({"without_gradient": list(self.silent)} if self.silent else {}),
        }


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
    world = join(model)
    progress = progress if progress is not None and world.is_main else Silent()
    folder = recipe.output
    if not resume:
        _check_free(folder, overwrite)
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
    reports, learners = _attach_all(task, model, start, learnt, batches, collator)
    for name, report in reports.items():
        progress.say(str(report) if len(reports) == 1 else f"{name}: {report}")
    for part in task.parts:
        warning = part.warning(model, tokenizer)
        if warning is not None:
            progress.say(warning)
    beside = _processes(task, model, learners)
    world.check_same("the recipe or the training data", (recipe.plain(), data_hash, str(checkpoint)))
    world.copy_from_main(_trained(model, learners))
    if world.shards:
        progress.say(shard(model, world))
    folder.mkdir(parents=True, exist_ok=True)
    if world.is_main and not resume:
        _clear([folder, *(part.recipe.output for part in task.parts)])
    done = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    if checkpoint is not None:
        progress.say(f"resuming after step {done} of {steps}")
        before = read_run(folder) or {}
        changed = what_changed(before)
        if (processes := before.get("processes", 1)) != world.size:
            changed.append(f"processes were {processes}, are {world.size}")
        if changed:
            told = "; ".join(changed)
            progress.say(f"the last digits may differ from those of an uninterrupted run: {told}")
    record = {**run_record(recipe, rows, data_hash, steps, list(reports.values())), "info": dict(task.info())}
    record["processes"] = world.size
    if world.is_main:
        write_json(folder / "run.json", record)

    from lorakit.train.gradient_watch import GradientWatch
    from lorakit.train.loop import AdapterTrainer, finish_on_interrupt
    from lorakit.train.out_of_memory import explained
    from lorakit.train.processes import Processes
    from lorakit.train.reporting import Reporting
    from lorakit.train.trackers import telling, trackers

    leaving = [partial(part.leave, tokenizer=tokenizer) for part in task.parts]
    recipes = [part.recipe for part in task.parts]
    writer = Writer(model, recipes, reports, record, leaving, writes=world.is_main)
    told_to = trackers(settings.report_to, folder) if world.is_main else []
    reporting = Reporting(
        MetricsFile(folder / "metrics.jsonl", keep_steps=done, writes=world.is_main),
        progress,
        log_every=settings.log_every,
        eval_every=settings.eval_every,
        max_seconds=settings.max_seconds,
        tokens=[sum(learnt[i].length for share in shares for i in share) for shares in rounds],
        unit=task.objective.unit,
        measure=None if valid is None else lambda: task.measure(model, measured, collator),
        adapters=list(reports) if len(reports) > 1 else (),
        best=best,
        keep=partial(writer.keep, folder),
        tell=telling(told_to, model) if told_to else None,
        device=next(model.parameters()).device,
        world=world,
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
    )
    without_printing(trainer)
    for callback in (*told_to, watch):
        trainer.add_callback(callback)
    if settings.activation_checkpointing:
        checkpoint_activations(model, True)
    try:
        with (
            finish_on_interrupt(reporting.interrupted, progress),
            explained(partial(_bill, task, model, learnt, batches, padded=collator.padded)),
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
        if settings.activation_checkpointing:
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
def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"The output {folder} is a file; name a folder.")
    run = read_run(folder) if folder.is_dir() else None
    if run is not None and not overwrite:
        how = run.get("ended", {}).get("how", "not finished")
        raise ConfigError(
            f"{folder} holds a run already ({how}). Resume it (--resume), replace it (--overwrite), or "
            "name another output (--out)."
        )


def _clear(folders: Sequence[Path]) -> None:
    """Remove what an older run left, lest it be taken for this one's; its adapter stays until it is replaced."""
    forget_best(folders)
    for folder in folders:
        for path in folder.glob("checkpoint-*"):
            if path.is_dir():
                shutil.rmtree(path)
        for name in (RECORD, TENSORS):
            (folder / name).unlink(missing_ok=True)


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


def _trained(model: PreTrainedModel, learners: Sequence[Learner]) -> list[Tensor]:
    """What is trained, each tensor once."""
    found = {id(p): p for learner in learners for p in parameters_of(model, learner.name)}
    return list(found.values())


def _bill(
    task: Task,
    model: PreTrainedModel,
    rows: Sequence[Row],
    batches: Sequence[Sequence[int]],
    *,
    padded: bool,
) -> Plan:
    """What the planner says that the run needs."""
    from lorakit.train.estimating import batch_shape, live_architecture, task_plan

    shape = batch_shape(rows, batches, task.recipe.train.accumulation, packed=not padded)
    return task_plan(task, live_architecture(model), shape)


def _attach_all(
    task: Task,
    model: PreTrainedModel,
    start: AdapterState | None,
    rows: Sequence[Row],
    batches: Sequence[Sequence[int]],
    collator: Collator,
) -> tuple[dict[str, AttachReport], list[Learner]]:
    """Put the adapters of all parts on the model; on an error none of them."""
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
        seed=settings.seed if settings.init_seed is None else settings.init_seed,
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
    base = _public_name(task.recipe.model.name)
    attached.spec = dataclasses.replace(attached.spec, base=base, info={**attached.spec.info, **task.info()})
    return report


def _processes(task: Task, model: PreTrainedModel, learners: Sequence[Learner]) -> list[TrainingProcess]:
    """What runs along; whatever does not fit the model or the number of steps is told before anything is written."""
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


def _public_name(name: str) -> str:
    return BUILTINS[name].hub_id if name in BUILTINS else name
