"""Train an adapter as a recipe says, and leave its files in the output folder."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.attach import AttachReport, detach, training_processes
from lorakit.attach.attachments import attachments_of
from lorakit.core import AdapterState, TrainingProcess
from lorakit.errors import ConfigError
from lorakit.io.model_files import save
from lorakit.models import BUILTINS, load_tokenizer, resolve
from lorakit.train.arguments import arguments, checkpoint_activations, optimizer_groups, without_printing
from lorakit.train.batches import plan_batches
from lorakit.train.classification import Classification
from lorakit.train.collate import PackedCollator
from lorakit.train.data import has_split
from lorakit.train.progress import Progress, Silent
from lorakit.train.quantized_base import check_handed_in, quantize_base
from lorakit.train.recipe import Recipe, TrainSection
from lorakit.train.run_files import (
    MetricsFile,
    checkpoint_to_resume,
    plot_loss,
    read_metrics,
    read_run,
    rows_hash,
    run_record,
    write_json,
)
from lorakit.train.starts import Batch, attach_adapter
from lorakit.train.task import CausalLm, Row, RowSet, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.train.reporting import Reporting


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Attributes:
        folder: The output folder.
        adapter: The folder of the trained adapter inside it.
        name: The adapter's name on ``model``.
        steps: Optimizer steps done, those before a resume included.
        seconds: Spent training, without loading and without scoring.
        tokens: Tokens read.
        learnt_tokens: Of these, tokens that were learnt; for a classifier, rows.
        losses: Mean loss over what each step taught, in nats.
        valid_loss: The last one measured, if the recipe names a valid split.
        stopped_by: ``"max_seconds"`` or ``"interrupt"`` when the run ended before its last step.
        report: What was attached.
        plot: The picture of the loss, where matplotlib is installed.
        model: The model with the trained adapter on it, in ``eval()``.
        tokenizer: Its tokenizer.
    """

    folder: Path
    adapter: Path
    name: str
    steps: int
    seconds: float
    tokens: int
    learnt_tokens: int
    losses: tuple[float, ...]
    valid_loss: float | None
    stopped_by: str | None
    report: AttachReport
    plot: Path | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

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
        TrainingError: The loss became infinite or NaN, or there is nothing to resume.
    """
    progress = progress or Silent()
    folder = recipe.output
    if not resume:
        _check_free(folder, overwrite)
    settings = recipe.train
    resolved = resolve(recipe.model.name) if model is None or tokenizer is None else None
    tokenizer = tokenizer or load_tokenizer(resolved or recipe.model.name, revision=recipe.model.revision)
    task: Task = Classification(recipe) if recipe.task == "classification" else CausalLm(recipe)
    rows = task.rows(tokenizer, "train")
    progress.say(f"train: {rows}")
    valid = task.rows(tokenizer, "valid") if has_split(recipe.data, "valid") else None
    if valid is not None:
        progress.say(f"valid: {valid}")
    data_hash = rows_hash(rows.rows, task.info().get("labels", ()))
    checkpoint = checkpoint_to_resume(folder, recipe.plain(), data_hash) if resume else None
    start = None
    if model is None:
        model = task.load(resolved or recipe.model.name)
        told, start = quantize_base(model, recipe, task.head)
        if told is not None:
            progress.say(told)
    else:
        check_handed_in(model, recipe)
        task.accept(model)
    _check_length(model, rows)
    collator, reason = task.collator(model, tokenizer)
    if reason is not None:
        progress.say(f"batches are padded: {reason}")
    batches = _plan(settings, rows.rows, not isinstance(collator, PackedCollator))
    steps = -(-len(batches) // settings.accumulation)
    first = [[rows.rows[i] for i in batch] for batch in batches[: recipe.adapter.start_batches]]
    report = _attach(task, model, start, lambda: map(collator, first))
    progress.say(str(report))
    warning = task.warning(model, tokenizer)
    if warning is not None:
        progress.say(warning)
    beside = _processes(recipe, model, steps)
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        _clear(folder)
    done = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    if checkpoint is not None:
        progress.say(f"resuming after step {done} of {steps}")
    record = {**run_record(recipe, rows, data_hash, steps, report), "info": dict(task.info())}
    write_json(folder / "run.json", record)

    from lorakit.train.loop import AdapterTrainer, finish_on_interrupt
    from lorakit.train.processes import Processes
    from lorakit.train.reporting import Reporting

    reporting = Reporting(
        MetricsFile(folder / "metrics.jsonl", keep_steps=done),
        progress,
        log_every=settings.log_every,
        eval_every=settings.eval_every,
        max_seconds=settings.max_seconds,
        tokens=[sum(len(rows.rows[i].ids) for i in batch) for batch in batches],
        unit=task.objective.unit,
        measure=None if valid is None else lambda: task.measure(model, valid.rows, collator),
    )
    trainer = AdapterTrainer(
        model,
        arguments(settings, folder, steps, model),
        rows.rows,
        batches,
        collator,
        task.objective,
        settings,
        recipe.adapter.name,
        reporting,
        Processes(beside),
    )
    without_printing(trainer)
    if settings.activation_checkpointing:
        checkpoint_activations(model, True)
    try:
        with finish_on_interrupt(reporting.interrupted, progress), warnings.catch_warnings():
            # torch asks for `optimizer.step()` first when a resumed scheduler is loaded; it was called
            # before the stop.
            warnings.filterwarnings(
                "ignore", message="Detected call of `lr_scheduler.step", category=UserWarning
            )
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except BaseException as error:
        ended = {"how": "error", "error": f"{type(error).__name__}: {error}"}
        write_json(folder / "run.json", {**record, "ended": ended})
        detach(model, recipe.adapter.name)  # a model that was handed in goes back as it came
        raise
    finally:
        model.eval()
        if settings.activation_checkpointing:
            checkpoint_activations(model, False)
    result = _finish(recipe, model, tokenizer, report, reporting, task.objective.unit)
    write_json(folder / "run.json", {**record, "ended": result.plain()})
    return result


def _finish(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: AttachReport,
    reporting: Reporting,
    unit: str,
) -> TrainResult:
    """Save the adapter and draw the loss."""
    folder, name = recipe.output, recipe.adapter.name
    adapter = save(model, folder / "adapter", name=name)
    metrics = read_metrics(folder / "metrics.jsonl")
    valid_losses = [line["valid_loss"] for line in metrics if "valid_loss" in line]
    return TrainResult(
        folder=folder,
        adapter=adapter,
        name=name,
        steps=len(reporting.losses),
        seconds=reporting.seconds,
        tokens=reporting.tokens_read,
        learnt_tokens=reporting.tokens_learnt,
        losses=tuple(reporting.losses),
        valid_loss=valid_losses[-1] if valid_losses else None,
        stopped_by=reporting.stopped_by,
        report=report,
        plot=plot_loss(metrics, folder / "loss.png", f"{recipe.model.name}, adapter {name!r}", unit),
        model=model,
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


def _clear(folder: Path) -> None:
    """Remove an older run's checkpoints, lest they be taken for this one's; its adapter stays until it is replaced."""
    for path in folder.glob("checkpoint-*"):
        if path.is_dir():
            shutil.rmtree(path)


def _check_length(model: PreTrainedModel, rows: RowSet) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(row.ids) for row in rows.rows)
    if isinstance(most, int) and longest > most:
        raise ConfigError(
            f"A row has {longest} tokens, but the model reads at most {most}: set train.max_length to {most} or less."
        )


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


def _processes(recipe: Recipe, model: PreTrainedModel, steps: int) -> list[TrainingProcess]:
    """What runs along; whatever does not fit the model or the number of steps is told before anything is written."""
    try:
        optimizer_groups(recipe.train, model)
        return training_processes(model, recipe.adapter.name, total_steps=steps)
    except ConfigError:
        detach(model, recipe.adapter.name)
        raise


def _public_name(name: str) -> str:
    return BUILTINS[name].hub_id if name in BUILTINS else name


def _plan(settings: TrainSection, rows: Sequence[Row], padded: bool) -> list[list[int]]:
    lengths = [len(row.ids) for row in rows]
    per_batch = settings.batch_rows or (None if settings.batch_tokens else 16)
    most = None if settings.max_steps is None else settings.max_steps * settings.accumulation
    # Each pass has at least one batch, so this many passes are enough for the steps.
    epochs = float(most) if most is not None else settings.epochs or 3.0
    return plan_batches(
        lengths,
        rows=per_batch,
        tokens=settings.batch_tokens,
        epochs=epochs,
        seed=settings.seed if settings.data_seed is None else settings.data_seed,
        padded=padded,
        most=most,
    )
