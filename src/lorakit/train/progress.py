"""Telling how a run goes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol, TextIO


@dataclass(frozen=True)
class StepReport:
    """One step of a run.

    Attributes:
        step: How many steps are done.
        steps: How many there will be.
        loss: Mean over the learnt tokens of this step, in nats.
        speed: Tokens or images read in a second (not only learnt ones), averaged since the start.
        seconds: Since the start.
        seconds_left: Expected.
        memory: The most bytes in use at once so far, see `lorakit.train.memory_use`; 0 where nobody knows.
        reads: What the speed counts: ``"token"`` or ``"image"``.
    """

    step: int
    steps: int
    loss: float
    speed: float
    seconds: float
    seconds_left: float
    memory: int = 0
    reads: str = "token"


class Progress(Protocol):
    """What `lorakit.train.train` and `lorakit.train.evaluate` tell about."""

    def say(self, line: str) -> None:
        """A line to keep."""

    def step(self, report: StepReport) -> None:
        """A training step is done."""

    def answered(self, done: int, total: int, what: str) -> None:
        """So many of all answers are written."""

    def close(self) -> None:
        """Nothing more comes."""


class Silent:
    """Tells nothing."""

    def say(self, line: str) -> None: ...

    def step(self, report: StepReport) -> None: ...

    def answered(self, done: int, total: int, what: str) -> None: ...

    def close(self) -> None: ...


class PlainProgress:
    """Lines of text, about one each few seconds, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, every_seconds: float = 5.0) -> None:
        self.stream, self.every = stream or sys.stderr, every_seconds
        self._last = -every_seconds
        self._last_answers = 0.0

    def say(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()

    def step(self, report: StepReport) -> None:
        if report.seconds - self._last < self.every and report.step != report.steps:
            return
        self._last = report.seconds
        self.say(
            f"step {report.step}/{report.steps}  loss {report.loss:.4f}  {report.speed:,.0f} {report.reads}s/s  "
            f"{clock(report.seconds)} gone, {clock(report.seconds_left)} left{memory_words(report.memory)}"
        )

    def answered(self, done: int, total: int, what: str) -> None:
        import time

        now = time.monotonic()
        if now - self._last_answers < self.every and done != total:
            return
        self._last_answers = now
        self.say(f"{what}: {done}/{total}")

    def close(self) -> None: ...


class RichProgress:
    """A bar with loss, speed and the time that is left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[detail]}"),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._tasks: dict[str, Any] = {}

    def say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, markup=False)

    def step(self, report: StepReport) -> None:
        detail = (
            f"loss {report.loss:.3f}  {report.speed:,.0f} {report.reads}s/s  {clock(report.seconds)} gone, "
            f"{clock(report.seconds_left)} left{memory_words(report.memory)}"
        )
        self._update("training", report.step, report.steps, detail)

    def answered(self, done: int, total: int, what: str) -> None:
        self._update(what, done, total, "")

    def close(self) -> None:
        self._bar.stop()

    def _update(self, what: str, done: int, total: int, detail: str) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total, detail=detail)
        self._bar.update(self._tasks[what], completed=done, total=total, detail=detail)


def progress_for(stream: TextIO | None = None) -> Progress:
    """A bar if the stream is a terminal, else lines."""
    stream = stream or sys.stderr
    return RichProgress() if stream is sys.stderr and stream.isatty() else PlainProgress(stream)


def memory_words(size: int) -> str:
    """``"  1.4 GB"``, or nothing where the size is not known."""
    return f"  {size / 1e9:.1f} GB" if size else ""


def clock(seconds: float) -> str:
    """``1:05`` or ``2:03:04``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
