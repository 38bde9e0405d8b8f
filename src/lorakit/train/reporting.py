"""What is written and told while a run goes on, and when it stops before its end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.train.best import Best
from lorakit.train.distributed import World
from lorakit.train.memory_use import peak_memory
from lorakit.train.progress import Progress, StepReport
from lorakit.train.run_files import MetricsFile, write_json
from lorakit.train.trackers import Tell

_STATE = "lorakit_reporting.json"


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
        unit: str,
        reads: str = "token",
        measure: Callable[[], Mapping[str, float]] | None,
        adapters: Sequence[str] = (),
        best: Best | None = None,
        keep: Callable[[Best], None] | None = None,
        tell: Tell | None = None,
        device: torch.device | str = "cpu",
        world: World | None = None,
        begun: Callable[[], object] = lambda: None,
    ) -> None:
        """Make the callback.

        Args:
            metrics: Where lines go.
            progress: Whom to tell.
            log_every: Steps between lines.
            eval_every: Steps between losses on the valid split; at the end in any case.
            max_seconds: When to stop.
            tokens: Tokens of each round of the plan, for the time that is left.
            unit: What is learnt, see `lorakit.train.loss.Objective`.
            reads: What is read, see there.
            measure: Computes ``valid_loss``, and perhaps more, on the valid split.
            adapters: Their names where several learn in one pass: then each one's loss is told beside the mean.
            best: What to watch on the valid split; with its patience it ends the run.
            keep: Called after the best measurement so far, to keep the adapters as they are.
            tell: Tells trackers each line of ``metrics.jsonl``.
            device: Where the model is, for the memory that is told.
            world: The processes that train together; what they tell and decide is the same for all.
            begun: Called when everything is ready for the first step.
        """
        self.metrics, self.progress, self.tokens, self.unit = metrics, progress, tokens, unit
        self.reads = reads
        self.measure, self.best, self.keep = measure, best, keep
        self.tell, self.device, self.world, self.begun = tell, device, world or World(), begun
        self.grad_norm: float | None = None
        self._owes_measurement = False
        self._untold: list[Mapping[str, Any]] = []
        self.log_every, self.eval_every, self.max_seconds = log_every, eval_every, max_seconds
        self.interrupted = threading.Event()
        self.stopped_by: str | None = None
        self.losses: list[float] = []
        self.tokens_read = self.tokens_learnt = 0
        self.seconds = 0.0
        self._resting = 0.0
        self._unlogged: list[tuple[float, int, float]] = []
        self._loss, self._learnt, self._rate, self._began = 0.0, 0, 0.0, time.perf_counter()
        self._penalty, self._penalised = 0.0, False
        self.losses_of: dict[str, list[float]] = {name: [] for name in adapters}
        self._loss_of = dict.fromkeys(adapters, 0.0)

    # ---- counted by the trainer
    def begin_step(self, learnt: int) -> None:
        """An optimizer step begins that teaches so much."""
        self._loss, self._learnt, self._penalty = 0.0, learnt, 0.0
        self._loss_of = dict.fromkeys(self._loss_of, 0.0)

    def add_batch(
        self, loss: float, tokens: int, learnt: int, penalty: float = 0.0, each: Sequence[float] = ()
    ) -> None:
        """A batch went forward and backward.

        Args:
            loss: Its share of the step's mean.
            tokens: What was read.
            learnt: What was learnt.
            penalty: What was added to the loss.
            each: The share of each adapter's mean, where several learn.
        """
        self._loss += loss
        for name, part in zip(self._loss_of, each, strict=False):
            self._loss_of[name] += part
        self._penalty += penalty
        self._penalised = self._penalised or penalty != 0
        self.tokens_read += tokens
        self.tokens_learnt += learnt

    # ---- kept in checkpoints
    def save(self, checkpoint: Path) -> None:
        """Write what a resumed run needs to go on counting."""
        state = {
            "tokens_read": self.tokens_read,
            "tokens_learnt": self.tokens_learnt,
            "seconds": self.seconds,
            "losses": self.losses,
            "losses_of": self.losses_of,
            "unlogged": self._unlogged,
            "penalised": self._penalised,
            "best": None if self.best is None else self.best.state_dict(),
            "owes_measurement": self._owes_measurement,
        }
        write_json(checkpoint / _STATE, state)

    def restore(self, checkpoint: Path) -> None:
        """Take up the counts of a checkpoint."""
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        self.tokens_read, self.tokens_learnt = state["tokens_read"], state["tokens_learnt"]
        self.losses, self.seconds = state["losses"], state["seconds"]
        self.losses_of = state["losses_of"]
        self._unlogged = [(loss, learnt, penalty) for loss, learnt, penalty in state["unlogged"]]
        self._penalised = state["penalised"]
        if self.best is not None and state.get("best") is not None:
            self.best.load_state_dict(state["best"])
        self._owes_measurement = state.get("owes_measurement", False)

    # ---- called by transformers
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        self.begun()
        self._began, self._resting = time.perf_counter() - self.seconds, 0.0
        if self.tell is not None:
            for line in self._untold:
                self.tell(line, args, state, control)

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
        for name, loss in self._loss_of.items():
            self.losses_of[name].append(loss)
        self._unlogged.append((self._loss, self._learnt, self._penalty))
        left = sum(self.tokens[step * args.gradient_accumulation_steps :])
        speed = self.tokens_read / self.seconds
        time_left = left / speed
        if self.max_seconds is not None:
            time_left = max(0.0, min(time_left, self.max_seconds - self.seconds))
        memory = peak_memory(self.device)
        self.progress.step(
            StepReport(step, state.max_steps, self._loss, speed, self.seconds, time_left, memory, self.reads)
        )
        # Asked last: whoever was told of the step may have pressed Ctrl-C at it.
        self.seconds, interrupted = self.world.most([self.seconds, float(self.interrupted.is_set())])
        if interrupted and not last:
            self.stopped_by = "interrupt"
        elif self.max_seconds is not None and self.seconds >= self.max_seconds and not last:
            self.stopped_by = "max_seconds"
        if step % self.log_every == 0 or last:
            self._told(self._line(step, speed, memory), args, state, control)
        due = last or (self.eval_every is not None and step % self.eval_every == 0)
        if self.measure is not None and (due or self.stopped_by == "max_seconds"):
            # After Ctrl-C the user waits: what is due is measured when the run goes on.
            self._owes_measurement = self.stopped_by == "interrupt"
            if not self._owes_measurement:
                self._told(self._measured(step, last=last), args, state, control)
        if self.stopped_by:
            control.should_training_stop = control.should_save = True

    def settle(self, checkpoint: Path, step: int) -> bool:
        """Make up for a measurement that a stop left out, and tell whether the run is over because of patience.

        Args:
            checkpoint: From which the run goes on; its counts are restored, and its adapters are on the model.
            step: Of that checkpoint.
        """
        if self._owes_measurement and self.measure is not None:
            line = self._measured(step, last=False)
            self._owes_measurement = False
            if self.world.is_main:
                self.save(checkpoint)
            self.metrics.add(line)
            self._untold.append(line)
        if self.best is not None and self.best.is_over:
            self.stopped_by = "patience"
        return self.stopped_by == "patience"

    def _measured(self, step: int, *, last: bool) -> dict[str, Any]:
        """Measure on the valid split; returns the line for ``metrics.jsonl``."""
        assert self.measure is not None
        began = time.perf_counter()
        values = self.world.of_main(self.measure())
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
        self.progress.say(f"step {step}: {told}")
        self._watch(step, values, last=last)
        self._resting += time.perf_counter() - began
        return {"step": step, **values}

    def _watch(self, step: int, values: Mapping[str, float], *, last: bool) -> None:
        """Keep the adapters if this measurement is the best one; stop if patience is at its end."""
        if self.best is None:
            return
        if self.best.seen(step, values) and self.keep is not None:
            self.keep(self.best)
        if self.best.is_over and not last:
            self.stopped_by = "patience"
            self.progress.say(
                f"step {step}: {self.best.metric} has not improved in {self.best.waited} measurements; the best, "
                f"{self.best.value:.4f}, was at step {self.best.step}. The run stops."
            )

    def _told(
        self, line: Mapping[str, Any], args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Write a line, and tell it to the trackers."""
        self.metrics.add(line)
        if self.tell is not None:
            self.tell(line, args, state, control)

    def _line(self, step: int, speed: float, memory: int) -> dict[str, Any]:
        """What ``metrics.jsonl`` says about the steps since the last line."""
        learnt = sum(n for _, n, _ in self._unlogged)
        penalty = sum(penalty for _, _, penalty in self._unlogged) / len(self._unlogged)
        line = {
            "step": step,
            "loss": sum(loss * n for loss, n, _ in self._unlogged) / max(1, learnt),
            **({"penalty": penalty} if self._penalised else {}),
            **{f"loss_{name}": losses[-1] for name, losses in self.losses_of.items()},
            "learning_rate": self._rate,
            **({} if self.grad_norm is None else {"grad_norm": self.grad_norm}),
            f"learnt_{self.unit}s": learnt,
            f"{self.reads}s_per_second": round(speed, 1),
            "seconds": round(self.seconds, 3),
            "peak_memory": memory,
        }
        self._unlogged.clear()
        return line
