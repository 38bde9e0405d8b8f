"""Train an adapter as a recipe says, and leave its files in the output folder."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.attach import AttachReport, attach, detach
from lorakit.attach.attachments import attachments_of
from lorakit.errors import ConfigError
from lorakit.io.model_files import save
from lorakit.models import BUILTINS, load_model, load_tokenizer, resolve
from lorakit.train.arguments import arguments, checkpoint_activations, without_printing
from lorakit.train.batches import plan_batches
from lorakit.train.collate import Collator, PaddedCollator, choose_collator
from lorakit.train.data import has_split, load_examples
from lorakit.train.loss import mean_loss
from lorakit.train.progress import Progress, Silent
from lorakit.train.recipe import Recipe, TrainSection
from lorakit.train.render import Rendered, RenderedSet, render, stop_id
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
from lorakit.train.stop_token import stop_token_warning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorakit.train.loop import Reporting


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
        learnt_tokens: Of these, tokens that were learnt.
        losses: Mean loss over the learnt tokens of each step, in nats.
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
    rows = _rows(recipe, tokenizer, "train")
    progress.say(f"train: {rows}")
    valid = _rows(recipe, tokenizer, "valid") if has_split(recipe.data, "valid") else None
    if valid is not None:
        progress.say(f"valid: {valid}")
    data_hash = rows_hash(rows.rows)
    checkpoint = checkpoint_to_resume(folder, recipe.plain(), data_hash) if resume else None
    if model is None:
        model = load_model(
            resolved or recipe.model.name,
            dtype=recipe.model.dtype,
            device=recipe.model.device,
            revision=recipe.model.revision,
        )
    _check_length(model, rows)
    collator = _collator(settings, model, tokenizer, progress)
    report = _attach(recipe, model)
    progress.say(str(report))
    warning = stop_token_warning(model, tokenizer, stop_id(tokenizer), recipe.adapter.name)
    if warning is not None:
        progress.say(warning)
    batches = _plan(settings, rows.rows, isinstance(collator, PaddedCollator))
    steps = -(-len(batches) // settings.accumulation)
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        _clear(folder)
    done = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    if checkpoint is not None:
        progress.say(f"resuming after step {done} of {steps}")
    record = run_record(recipe, rows, data_hash, steps, report)
    write_json(folder / "run.json", record)

    from lorakit.train.loop import AdapterTrainer, Reporting, finish_on_interrupt

    reporting = Reporting(
        MetricsFile(folder / "metrics.jsonl", keep_steps=done),
        progress,
        log_every=settings.log_every,
        eval_every=settings.eval_every,
        max_seconds=settings.max_seconds,
        tokens=[sum(len(rows.rows[i].ids) for i in batch) for batch in batches],
        valid_loss=None if valid is None else lambda: mean_loss(model, valid.rows, collator, settings),
    )
    options = arguments(settings, folder, steps, model)
    trainer = AdapterTrainer(model, options, rows.rows, batches, collator, recipe.adapter.name, reporting)
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
    result = _finish(recipe, model, tokenizer, report, reporting)
    write_json(folder / "run.json", {**record, "ended": result.plain()})
    return result


def _finish(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: AttachReport,
    reporting: Reporting,
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
        plot=plot_loss(metrics, folder / "loss.png", f"{recipe.model.name}, adapter {name!r}"),
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


def _rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, split: Any) -> RenderedSet:
    examples = load_examples(recipe.data, split, learning=True)
    return render(examples, tokenizer, max_length=recipe.train.max_length, overlong=recipe.train.overlong)


def _check_length(model: PreTrainedModel, rows: RenderedSet) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(row.ids) for row in rows.rows)
    if isinstance(most, int) and longest > most:
        raise ConfigError(
            f"A row has {longest} tokens, but the model reads at most {most}: set train.max_length to {most} or less."
        )


def _collator(
    settings: TrainSection, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> Collator:
    collator, reason = choose_collator(settings.batching, model, tokenizer)
    if reason is not None:
        progress.say(f"batches are padded: {reason}")
    return collator


def _attach(recipe: Recipe, model: PreTrainedModel) -> AttachReport:
    section, settings = recipe.adapter, recipe.train
    seed = settings.seed if settings.init_seed is None else settings.init_seed
    report = attach(
        model, section.adapter(), section.targets, name=section.name, exclude=section.exclude, seed=seed
    )
    if not report.trainable:
        detach(model, section.name)
        raise ConfigError("The adapter has nothing to train.")
    attached = attachments_of(model).adapter(section.name)
    # Written into the adapter's files: the model's public name rather than a folder of this machine's cache.
    attached.spec = dataclasses.replace(attached.spec, base=_public_name(recipe.model.name))
    return report


def _public_name(name: str) -> str:
    return BUILTINS[name].hub_id if name in BUILTINS else name


def _plan(settings: TrainSection, rows: Sequence[Rendered], padded: bool) -> list[list[int]]:
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
