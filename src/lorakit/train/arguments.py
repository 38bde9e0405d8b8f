"""A recipe's training settings as transformers takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.attach import parameter_groups
from lorakit.train.recipe import TrainSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments


def arguments(
    settings: TrainSection,
    folder: Path,
    steps: int,
    model: PreTrainedModel,
    *,
    clip: bool = True,
    processes: int = 1,
) -> TrainingArguments:
    """A recipe's settings in transformers' words; what lorakit does itself is switched off.

    Args:
        settings: The recipe's.
        folder: Where checkpoints go.
        steps: Optimizer steps.
        model: What is trained.
        clip: Whether transformers clips the gradients, all together.
        processes: How many share the batches of a step, see `lorakit.train.batches.shared_out`.
    """
    from transformers import TrainingArguments

    schedule, warmup = _schedule(settings, steps)
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,  # the plan holds all passes
        per_device_train_batch_size=settings.batch_rows or 1,
        gradient_accumulation_steps=-(-settings.accumulation // processes),
        learning_rate=settings.lr,
        lr_scheduler_type=schedule,
        warmup_steps=warmup,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.max_grad_norm if clip else 0.0,
        seed=settings.seed_of("dropout"),
        save_strategy="no" if settings.save_every is None else "steps",
        save_steps=settings.save_every or steps,
        save_total_limit=settings.keep_checkpoints,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        report_to="none",  # `lorakit.train.trackers` makes their callbacks
        run_name=folder.name,
        project="lorakit",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
        bf16=False,
        fp16=False,
    )


def _schedule(settings: TrainSection, steps: int) -> tuple[str, int]:
    """The name of the schedule in transformers, and the number of steps with a rising rate."""
    warmup = settings.warmup * steps if settings.warmup < 1 else settings.warmup
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    return name, round(warmup)


def schedule_of(settings: TrainSection, steps: int) -> Callable[[int], float]:
    """The learning rate after so many of ``steps``, as a share of its peak."""
    from transformers import get_scheduler

    name, warmup = _schedule(settings, steps)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    (rate,) = scheduler.lr_lambdas
    return rate


def optimizer_groups(settings: TrainSection, model: nn.Module) -> list[dict[str, Any]]:
    """A recipe's settings as an optimizer's groups, see `lorakit.parameter_groups`.

    Raises:
        ConfigError: No parameter has a role that should be fast.
    """
    return parameter_groups(
        model,
        lr=settings.lr,
        lora_plus_ratio=settings.lora_plus_ratio,
        weight_decay=settings.weight_decay,
        fast=settings.fast,
        embedding_lr=settings.embedding_lr,
    )


def without_printing(trainer: Any) -> None:
    """Without transformers' own printing; `Reporting` tells."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
