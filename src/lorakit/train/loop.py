"""transformers' Trainer with lorakit's batches, loss and checkpoints.

Its loop, its optimizer step and its resume are used as they are.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from lorakit.train.around_batches import Around
from lorakit.train.bad_batch import RECORD, write_bad_batch
from lorakit.train.batches import PlannedBatches
from lorakit.train.collate import Collator
from lorakit.train.distributed import World, without_wrapper
from lorakit.train.learners import Learner, learner_groups, learner_schedule
from lorakit.train.loss import Objective
from lorakit.train.packing import packed
from lorakit.train.processes import ClipEach, Processes
from lorakit.train.progress import Progress
from lorakit.train.recipe import TrainSection
from lorakit.train.reporting import Reporting
from lorakit.train.row_set import Row
from lorakit.train.schedule import set_rates, timed_schedule


class AdapterTrainer(Trainer):
    """Trains one adapter of a model, or several in one pass.

    What is ours: the batches follow a plan made beforehand; the loss is the sum over the learnt tokens (or the labels)
    divided by their number in the whole optimizer step, whatever the batches; the processes of the adapter's methods
    run along; checkpoints hold the adapter and not the base; a loss that is not finite stops the run.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rows: Sequence[Row],
        rounds: Sequence[Sequence[list[int]]],
        collator: Collator,
        objective: Objective,
        settings: TrainSection,
        learners: Sequence[Learner],
        reporting: Reporting,
        processes: Processes,
        world: World,
        around: Around | None = None,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=rows, data_collator=collator)
        without_wrapper(self)
        self.world, self.around = world, around
        self.rows, self.rounds, self.collator, self.learners = rows, rounds, collator, tuple(learners)
        self.objective, self.settings = objective, settings
        self.reporting, self.processes = reporting, processes
        if len(self.learners) > 1:
            self.add_callback(ClipEach(self.learners, settings.max_grad_norm))
        self.add_callback(processes)
        self.add_callback(reporting)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by what the whole step teaches
        self._share = torch.zeros(())
        self._shares = torch.zeros(1)
        self._in_step: list[dict[str, Tensor]] = []
        self._done_in_step = 0
        if world.rank:  # other rows, other dropout
            torch.manual_seed(args.seed + 7919 * world.rank)
        # The running statistics of a frozen base stay what they are: nothing would save what they became.
        self._statistics = [module for module in model.modules() if hasattr(module, "running_mean")]

    # ---- data
    def get_train_dataloader(self) -> DataLoader[Any]:
        """The planned batches, in their order."""
        loader: DataLoader[Any] = DataLoader(
            cast("Dataset[Any]", self.rows),
            batch_sampler=PlannedBatches([self._own(shares) for shares in self.rounds]),
            collate_fn=self.collator,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        # With several processes the rows are shared out already; accelerate would do it again.
        return self.accelerator.prepare(loader) if self.world.size == 1 else loader

    def _own(self, shares: Sequence[list[int]]) -> list[int]:
        """The rows of this process in a round; where none are left the shortest one of another, to keep step."""
        everybody = (row for share in shares for row in share)
        return shares[self.world.rank] or [min(everybody, key=lambda row: self.rows[row].length)]

    def _idles(self, place: int) -> bool:
        """Whether this process has no rows in a round of the step in hand."""
        number = self.state.global_step * self.args.gradient_accumulation_steps + place
        return not self.rounds[number][self.world.rank]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The batches of one optimizer step, and how much they teach on all processes."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self._in_step, self._done_in_step = batches, 0
        counts = [torch.as_tensor(self.objective.count(batch)) for batch in batches]
        own = sum(count * (not self._idles(place)) for place, count in enumerate(counts))
        learnt = torch.as_tensor(own, device=device)
        if self.world.size > 1:
            total = self.world.total(learnt.reshape(-1).tolist())
            learnt = torch.tensor(total, device=device).reshape(learnt.shape).to(learnt.dtype)
        self.reporting.begin_step(int(learnt.sum()))
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
        for module in self._statistics:
            module.eval()
        counts = torch.as_tensor(num_items_in_batch)
        # A mean for each adapter over what it learns in this step; one that learns nothing adds nothing.
        shares = self.objective.summed(model, base, inputs) / counts.clamp(min=1)
        if self._idles(self._done_in_step):
            shares = shares * 0
        self._shares = shares.detach().reshape(-1)
        self._share = self._shares.sum() / max(1, int((counts > 0).sum()))
        loss = shares.sum()
        penalty = self.processes.penalty_once()
        # The gradients of the processes are summed.
        return loss if penalty is None else loss + penalty / self.world.size

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward pass."""
        base = self.accelerator.unwrap_model(model)
        # Around backward too, where activation checkpointing runs the layers again.
        with packed(base) if "cu_seq_lens_q" in inputs else nullcontext(), self._around_batch():
            loss = super().training_step(model, inputs, num_items_in_batch)
        read, learnt = self.objective.read(inputs), int(torch.as_tensor(self.objective.count(inputs)).sum())
        counted = [0, 0] if self._idles(self._done_in_step) else [read, learnt]
        own = [loss.item(), self._share.item(), *counted, *self._shares.tolist()]
        value, share, read_by_all, learnt_by_all, *shares = self.world.total(own)
        if not math.isfinite(value):
            self._stop_at(self._done_in_step, f"loss became {value}")
        self._done_in_step += 1
        self.reporting.add_batch(share, int(read_by_all), int(learnt_by_all), value - sum(shares), shares)
        if self._done_in_step == len(self._in_step):
            self.world.add_gradients(
                parameter for group in self.optimizer.param_groups for parameter in group["params"]
            )
        return loss

    def _around_batch(self) -> AbstractContextManager[None]:
        """What the batch in hand is run in."""
        if self.around is None:
            return nullcontext()
        number = self.state.global_step * self.args.gradient_accumulation_steps + self._done_in_step
        return self.around(self._own(self.rounds[number]))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the whole gradient; one that is not finite stops the run before it reaches the adapter."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = float(norm)
        if not math.isfinite(value):
            self._stop_at(None, f"gradient became {value}")
        self.reporting.grad_norm = value
        return norm

    def _stop_at(self, place: int | None, what: str) -> None:
        """Keep the batch at a place of the step (None for all of them), and stop.

        Raises:
            TrainingError: Always.
        """
        places = list(range(len(self._in_step))) if place is None else [place]
        step = self.state.global_step
        rounds = [self.rounds[step * self.args.gradient_accumulation_steps + i] for i in places]
        numbers = [[row for share in shares for row in share] for shares in rounds]
        batches = [self._in_step[i] for i in places]
        if self.world.size > 1:  # the rows of all processes, for nobody knows whose it was
            batches = [self.collator([self.rows[row] for row in rows]) for rows in numbers]
        path = Path(self.args.output_dir) / RECORD
        if self.world.is_main:
            write_bad_batch(
                path.parent, step=step + 1, what=what, numbers=numbers, rows=self.rows, batches=batches
            )
        self.world.wait()
        raise TrainingError(
            f"The {what} in step {step + 1}; the adapter of that step is not saved. The rows are named in {path}, "
            "with their tensors beside it. Lower train.lr, lengthen train.warmup, or set train.max_grad_norm; in half "
            "precision also try model.dtype: float32."
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers' estimate takes the base for trained."""
        return 0

    # ---- optimizer
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over `lorakit.parameter_groups`: matrices decay, vectors do not; LoRA+ where a ratio is asked for."""
        optimizer: torch.optim.Optimizer | None = self.optimizer
        if optimizer is None:
            groups = learner_groups(self.settings, self.model if model is None else model, self.learners)
            optimizer = torch.optim.AdamW(groups, betas=self.settings.betas, eps=self.args.adam_epsilon)
            self.optimizer = optimizer
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of transformers; where several adapters learn, each adapter's own."""
        if len(self.learners) > 1 and self.lr_scheduler is None:
            self.lr_scheduler = learner_schedule(
                self.optimizer if optimizer is None else optimizer, self.learners, self.settings
            )
            self._created_lr_scheduler = True
        elif self.settings.max_seconds is not None and self.lr_scheduler is None:
            self.lr_scheduler = timed_schedule(
                self.optimizer if optimizer is None else optimizer,
                self.settings,
                num_training_steps,
                lambda: self.reporting.seconds,
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- checkpoints
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, which is all that changed, and where its processes and the reports are.

        In lorakit's own form, number for number as it is in memory: PEFT's files leave out what only training needs.
        """
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            for name, place in self._places(folder):
                state = state_of(self.accelerator.unwrap_model(self.model), name, copy=False)
                write(state, place, form="native")
            self.processes.save(folder)
            self.reporting.save(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """The random states of all processes, before what says that the checkpoint is whole."""
        super()._save_rng_state(output_dir)
        self.world.wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Put a checkpoint's adapter into the parameters that are there, bit for bit."""
        self.processes.restore(Path(resume_from_checkpoint))
        self.reporting.restore(Path(resume_from_checkpoint))
        attachments = attachments_of(self.model if model is None else model)
        for learner, place in self._places(Path(resume_from_checkpoint)):
            state = read(place)
            with torch.no_grad():
                for path, adapter in attachments.parameters_of(learner):
                    for name, parameter in adapter._parameters.items():
                        if parameter is not None:
                            parameter.copy_(state.parameters(path)[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The optimizer's state, with the rates of this run's schedule: a time limit may be another one now."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.lr_scheduler is not None:
            set_rates(self.optimizer, self.lr_scheduler)

    def is_over(self, checkpoint: Path, step: int) -> bool:
        """Whether a run that would go on from a checkpoint has ended there, its patience being at its end.

        The adapter is put on the model then, and its processes are finished, as at the end of any run.
        """
        self._load_from_checkpoint(str(checkpoint))
        over = self.reporting.settle(checkpoint, step)
        if over:
            for process in self.processes.processes:
                process.finish()
        return over

    def _places(self, checkpoint: Path) -> list[tuple[str, Path]]:
        """Each adapter with its folder in a checkpoint: the checkpoint itself where there is one adapter."""
        names = [learner.name for learner in self.learners]
        return [(name, checkpoint if len(names) == 1 else checkpoint / name) for name in names]


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
