"""transformers' Trainer with lorakit's batches, loss and checkpoints.

Its loop, its optimizer step and its resume are used as they are.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from lorakit.attach.attach import state_of
from lorakit.attach.attachments import attachments_of
from lorakit.errors import TrainingError
from lorakit.io.adapter_directory import read, write
from lorakit.train.arguments import optimizer_groups
from lorakit.train.batches import PlannedBatches
from lorakit.train.collate import Collator
from lorakit.train.loss import Objective
from lorakit.train.packing import packed
from lorakit.train.processes import Processes
from lorakit.train.progress import Progress
from lorakit.train.recipe import TrainSection
from lorakit.train.reporting import Reporting
from lorakit.train.run_files import write_json
from lorakit.train.task import Row


class AdapterTrainer(Trainer):
    """Trains one adapter of a model.

    What is ours: the batches follow a plan made beforehand; the loss is the sum over the learnt tokens (or the labels)
    divided by their number in the whole optimizer step, whatever the batches; the processes of the adapter's methods
    run along; checkpoints hold the adapter and not the base; a loss that is not finite stops the run.
    """

    optimizer: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rows: Sequence[Row],
        batches: Sequence[list[int]],
        collator: Collator,
        objective: Objective,
        settings: TrainSection,
        adapter: str,
        reporting: Reporting,
        processes: Processes,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=rows, data_collator=collator)
        self.rows, self.batches, self.collator, self.adapter = rows, batches, collator, adapter
        self.objective, self.settings = objective, settings
        self.reporting, self.processes = reporting, processes
        self.add_callback(processes)
        self.add_callback(reporting)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by what the whole step teaches
        self._share = torch.zeros(())

    # ---- data
    def get_train_dataloader(self) -> DataLoader[Any]:
        """The planned batches, in their order."""
        loader: DataLoader[Any] = DataLoader(
            cast("Dataset[Any]", self.rows),
            batch_sampler=PlannedBatches(self.batches),
            collate_fn=self.collator,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The batches of one optimizer step, and how much they teach on all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        learnt = torch.tensor(sum(self.objective.count(batch) for batch in batches), device=device)
        if self.args.world_size > 1:
            learnt = self.accelerator.gather(learnt).sum()
        self.reporting.begin_step(int(learnt))
        return batches, learnt

    # ---- loss
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The share of a batch in the mean over what the step teaches, and once in a step the methods' penalty."""
        assert num_items_in_batch is not None
        base = self.accelerator.unwrap_model(model)
        loss = self.objective.summed(model, base, inputs) / num_items_in_batch
        # Data-parallel training averages over the processes what is meant to be summed.
        loss = loss * self.args.world_size
        self._share = loss.detach()
        penalty = self.processes.penalty_once()
        return loss if penalty is None else loss + penalty

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward pass."""
        base = self.accelerator.unwrap_model(model)
        # Around backward too, where activation checkpointing runs the layers again.
        with packed(base) if "cu_seq_lens_q" in inputs else nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        if not math.isfinite(value):
            path = Path(self.args.output_dir) / "bad_batch.json"
            write_json(
                path,
                {
                    "step": self.state.global_step,
                    "input_ids": inputs["input_ids"].tolist(),
                    "labels": inputs["labels"].tolist(),
                },
            )
            raise TrainingError(
                f"The loss became {value} in step {self.state.global_step + 1}; the adapter of that step "
                "is not saved. The batch is in "
                f"{path}. Lower train.lr, lengthen train.warmup, or set train.max_grad_norm; in half "
                "precision also try "
                "model.dtype: float32."
            )
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        self.reporting.add_batch(
            self._share.item(), tokens, self.objective.count(inputs), value - self._share.item()
        )
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers' estimate takes the base for trained."""
        return 0

    # ---- optimizer
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over `lorakit.parameter_groups`: matrices decay, vectors do not; LoRA+ where a ratio is asked for."""
        optimizer: torch.optim.Optimizer | None = self.optimizer
        if optimizer is None:
            groups = optimizer_groups(self.settings, self.model if model is None else model)
            optimizer = torch.optim.AdamW(groups, betas=self.settings.betas, eps=self.args.adam_epsilon)
            self.optimizer = optimizer
        return optimizer

    # ---- checkpoints
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, which is all that changed, and where its processes and the reports are.

        In lorakit's own form, number for number as it is in memory: PEFT's files leave out what only training needs.
        """
        if self.args.should_save:
            state = state_of(self.accelerator.unwrap_model(self.model), self.adapter, copy=False)
            folder = write(state, output_dir or self.args.output_dir, form="native")
            self.processes.save(folder)
            self.reporting.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Put a checkpoint's adapter into the parameters that are there, bit for bit."""
        state = read(resume_from_checkpoint)
        self.processes.restore(Path(resume_from_checkpoint))
        self.reporting.restore(Path(resume_from_checkpoint))
        attachments = attachments_of(self.model if model is None else model)
        with torch.no_grad():
            for path, adapter in attachments.parameters_of(self.adapter):
                for name, parameter in adapter._parameters.items():
                    if parameter is not None:
                        parameter.copy_(state.parameters(path)[name])


@contextmanager
def finish_on_interrupt(event: threading.Event, progress: Progress) -> Iterator[None]:
    """Let the first Ctrl-C set an event, so that the step in hand is finished and saved; the second acts as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        progress.say(
            "Ctrl-C: this step is finished and saved, then the run stops. Press again to stop at once."
        )

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
