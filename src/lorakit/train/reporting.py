"""What is written and told while a run goes on, and when it stops before its end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.train.progress import Progress, StepReport
from lorakit.train.run_files import MetricsFile, write_json

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
        measure: Callable[[], Mapping[str, float]] | None,
    ) -> None:
        """Make the callback.

        Args:
            metrics: Where lines go.
            progress: Whom to tell.
            log_every: Steps between lines.
            eval_every: Steps between losses on the valid split; at the end in any case.
            max_seconds: When to stop.
            tokens: Tokens of each batch of the plan, for the time that is left.
            unit: What is learnt, see `lorakit.train.loss.Objective`.
            measure: Computes ``valid_loss``, and perhaps more, on the valid split.
        """
        self.metrics, self.progress, self.tokens, self.unit = metrics, progress, tokens, unit
        self.measure = measure
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

    # ---- counted by the trainer
    def begin_step(self, learnt: int) -> None:
        """An optimizer step begins that teaches so much."""
        self._loss, self._learnt, self._penalty = 0.0, learnt, 0.0

    def add_batch(self, loss: float, tokens: int, learnt: int, penalty: float = 0.0) -> None:
        """A batch went forward and backward; ``loss`` is its share of the step's mean, ``penalty`` what was added."""
        self._loss += loss
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
            "unlogged": self._unlogged,
            "penalised": self._penalised,
        }
        write_json(checkpoint / _STATE, state)

    def restore(self, checkpoint: Path) -> None:
        """Take up the counts of a checkpoint."""
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        self.tokens_read, self.tokens_learnt = state["tokens_read"], state["tokens_learnt"]
        self.losses, self.seconds = state["losses"], state["seconds"]
        self._unlogged = [(loss, learnt, penalty) for loss, learnt, penalty in state["unlogged"]]
        self._penalised = state["penalised"]

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
        self._unlogged.append((self._loss, self._learnt, self._penalty))
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
        if self.measure is not None and due and self.stopped_by is None:
            began = time.perf_counter()
            values = self.measure()
            self._resting += time.perf_counter() - began
            self.metrics.add({"step": step, **values})
            told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
            self.progress.say(f"step {step}: {told}")

    def _log(self, step: int, speed: float) -> None:
        learnt = sum(n for _, n, _ in self._unlogged)
        penalty = sum(penalty for _, _, penalty in self._unlogged) / len(self._unlogged)
        self.metrics.add(
            {
                "step": step,
                "loss": sum(loss * n for loss, n, _ in self._unlogged) / max(1, learnt),
                **({"penalty": penalty} if self._penalised else {}),
                "learning_rate": self._rate,
                f"learnt_{self.unit}s": learnt,
                "tokens_per_second": round(speed, 1),
                "seconds": round(self.seconds, 3),
            }
        )
        self._unlogged.clear()
