"""transformers' Trainer with lorakit's batches, loss and checkpoints.

Its loop, its optimizer step and its resume are used as they are.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.attach import trainable
from lorakit.attach.attachments import attachments_of
from lorakit.errors import TrainingError
from lorakit.io.adapter_directory import read
from lorakit.io.model_files import save
from lorakit.train.batches import PlannedBatches
from lorakit.train.collate import PackedCollator, PaddedCollator
from lorakit.train.loss import count_learnt, summed_loss
from lorakit.train.packing import packed
from lorakit.train.progress import Progress, StepReport
from lorakit.train.render import Rendered
from lorakit.train.run_files import MetricsFile, write_json

REPORTING = "lorakit_reporting.json"


class AdapterTrainer(Trainer):
    """Trains one adapter of a model.

    What is ours: the batches follow a plan made beforehand; the loss is the sum over the learnt tokens divided by
    their number in the whole optimizer step, whatever the batches; checkpoints hold the adapter and not the base; a
    loss that is not finite stops the run.
    """

    optimizer: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rows: Sequence[Rendered],
        batches: Sequence[list[int]],
        collator: PackedCollator | PaddedCollator,
        adapter: str,
        reporting: Reporting,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=rows, data_collator=collator)
        self.rows, self.batches, self.collator, self.adapter = rows, batches, collator, adapter
        self.reporting = reporting
        self.add_callback(reporting)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step

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
        """The batches of one optimizer step, and how many tokens they teach on all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        learnt = torch.tensor(sum(count_learnt(batch) for batch in batches), device=device)
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
        """The share of a batch in the mean over the step's learnt tokens."""
        assert num_items_in_batch is not None
        loss = summed_loss(model, self.accelerator.unwrap_model(model), inputs) / num_items_in_batch
        # Data-parallel training averages over the processes what is meant to be summed.
        return loss * self.args.world_size

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward pass."""
        base = self.accelerator.unwrap_model(model)
        # Around backward too, where activation checkpointing runs the layers again.
        with packed(base) if "cu_seq_lens_q" in inputs else nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch)
        value = loss.item()
        if not torch.isfinite(loss):
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
        self.reporting.add_batch(value, tokens, count_learnt(inputs))
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers' estimate takes the base for trained."""
        return 0

    # ---- optimizer
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over what `lorakit.trainable` names; matrices decay, vectors do not."""
        optimizer: torch.optim.Optimizer | None = self.optimizer
        if optimizer is None:
            named = trainable(self.model if model is None else model)
            vectors = self._vectors()
            matrices = [p for p in named.values() if id(p) not in vectors]
            rest = [p for p in named.values() if id(p) in vectors]
            decays = ((matrices, self.args.weight_decay), (rest, 0.0))
            optimizer = torch.optim.AdamW(
                [{"params": group, "weight_decay": decay} for group, decay in decays if group],
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
            self.optimizer = optimizer
        return optimizer

    def _vectors(self) -> set[int]:
        """The parameters that stand for a vector; a copy of one is kept as a matrix with a single column."""
        return {
            id(p)
            for _, adapter in attachments_of(self.model).parameters_of(self.adapter)
            for name, p in adapter._parameters.items()
            if p is not None
            and (p.dim() < 2 or (adapter.method.roles.get(name) == "copy" and p.shape[-1] == 1))
        }

    # ---- checkpoints
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, which is all that changed, and what the reports have counted so far."""
        if self.args.should_save:
            folder = save(
                self.accelerator.unwrap_model(self.model),
                output_dir or self.args.output_dir,
                name=self.adapter,
            )
            write_json(folder / REPORTING, self.reporting.state())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Put a checkpoint's adapter into the parameters that are there, bit for bit."""
        state = read(resume_from_checkpoint)
        self.reporting.restore(Path(resume_from_checkpoint))
        attachments = attachments_of(self.model if model is None else model)
        with torch.no_grad():
            for path, adapter in attachments.parameters_of(self.adapter):
                for name, parameter in adapter._parameters.items():
                    if parameter is not None:
                        parameter.copy_(state.parameters(path)[name])


class Reporting(TrainerCallback):
    """Writes ``metrics.jsonl``, tells the progress, and stops the run when its time is up or Ctrl-C was pressed."""

    def __init__(
        self,
        metrics: MetricsFile,
        progress: Progress,
        *,
        log_every: int,
        eval_every: int | None,
        max_seconds: float | None,
        tokens: Sequence[int],
        valid_loss: Callable[[], float] | None,
    ) -> None:
        """Make the callback.

        Args:
            metrics: Where lines go.
            progress: Whom to tell.
            log_every: Steps between lines.
            eval_every: Steps between losses on the valid split; at the end in any case.
            max_seconds: When to stop.
            tokens: Tokens of each batch of the plan, for the time that is left.
            valid_loss: Computes the loss on the valid split.
        """
        self.metrics, self.progress, self.tokens, self.valid_loss = metrics, progress, tokens, valid_loss
        self.log_every, self.eval_every, self.max_seconds = log_every, eval_every, max_seconds
        self.interrupted = threading.Event()
        self.stopped_by: str | None = None
        self.losses: list[float] = []
        self.tokens_read = self.tokens_learnt = 0
        self.seconds = 0.0
        self._resting = 0.0
        self._unlogged: list[tuple[float, int]] = []
        self._loss, self._learnt, self._rate, self._began = 0.0, 0, 0.0, time.perf_counter()

    # ---- counted by the trainer
    def begin_step(self, learnt: int) -> None:
        """An optimizer step begins that teaches so many tokens."""
        self._loss, self._learnt = 0.0, learnt

    def add_batch(self, loss: float, tokens: int, learnt: int) -> None:
        """A batch went forward and backward; ``loss`` is its share of the step's mean."""
        self._loss += loss
        self.tokens_read += tokens
        self.tokens_learnt += learnt

    # ---- kept in checkpoints
    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting."""
        return {
            "tokens_read": self.tokens_read,
            "tokens_learnt": self.tokens_learnt,
            "seconds": self.seconds,
            "losses": self.losses,
            "unlogged": self._unlogged,
        }

    def restore(self, checkpoint: Path) -> None:
        """Take up the counts of a checkpoint."""
        state = json.loads((checkpoint / REPORTING).read_text(encoding="utf-8"))
        self.tokens_read, self.tokens_learnt = state["tokens_read"], state["tokens_learnt"]
        self.losses, self.seconds = state["losses"], state["seconds"]
        self._unlogged = [(loss, learnt) for loss, learnt in state["unlogged"]]

    # ---- called by transformers
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter() - self.seconds

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Note the learning rate that this step takes."""
        self._rate = given["lr_scheduler"].get_last_lr()[0]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell, write, and decide whether to go on."""
        step, last = state.global_step, state.global_step == state.max_steps
        self.seconds = time.perf_counter() - self._began - self._resting
        self.losses.append(self._loss)
        self._unlogged.append((self._loss, self._learnt))
        left = sum(self.tokens[step * args.gradient_accumulation_steps :])
        speed = self.tokens_read / self.seconds
        self.progress.step(StepReport(step, state.max_steps, self._loss, speed, self.seconds, left / speed))
        if self.interrupted.is_set() and not last:
            self.stopped_by = "interrupt"
        elif self.max_seconds is not None and self.seconds >= self.max_seconds and not last:
            self.stopped_by = "max_seconds"
        if self.stopped_by:
            control.should_training_stop = control.should_save = True
        if step % self.log_every == 0 or last:
            self._log(step, speed)
        due = last or (self.eval_every is not None and step % self.eval_every == 0)
        if self.valid_loss is not None and due and self.stopped_by is None:
            began = time.perf_counter()
            value = self.valid_loss()
            self._resting += time.perf_counter() - began
            self.metrics.add({"step": step, "valid_loss": value})
            self.progress.say(f"step {step}: valid loss {value:.4f}")

    def _log(self, step: int, speed: float) -> None:
        learnt = sum(n for _, n in self._unlogged)
        self.metrics.add(
            {
                "step": step,
                "loss": sum(loss * n for loss, n in self._unlogged) / max(1, learnt),
                "learning_rate": self._rate,
                "learnt_tokens": learnt,
                "tokens_per_second": round(speed, 1),
                "seconds": round(self.seconds, 3),
            }
        )
        self._unlogged.clear()


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
