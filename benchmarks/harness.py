"""How every benchmark here measures: interleaved in one process, and told with its spread.

The sides of a comparison take turns (A B A B ...), so that a slow minute of the machine hits both. Each ratio is taken
within one round and the median of those is reported, never a ratio of two averages from different minutes.
Short operations are repeated until the clock can see them; the garbage collector rests while the clock runs.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.machine import git_revision, load_average, machine, versions

# Neither side may reach for the network while it is timed.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

LORAKIT, PEFT, BASE = "lorakit", "peft", "base"
Run = Callable[[], object]
Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Side:
    """One contender.

    Attributes:
        run: What is timed.
        before: Prepares one run, untimed; a side that needs it is never repeated within one timing.
        after: Cleans up after one run, untimed.
    """

    run: Run
    before: Run | None = None
    after: Run | None = None

    @property
    def repeatable(self) -> bool:
        """Whether ``run`` may be called many times in one timing."""
        return self.before is None and self.after is None


@dataclass(frozen=True)
class Aim:
    """What a figure should reach.

    Attributes:
        of: ``"ratio"``, or the side whose median must reach it.
        relation: ``">="`` or ``"<="``.
        value: The bound.
    """

    of: str
    relation: Literal[">=", "<="]
    value: float

    def met(self, figure: float) -> bool:
        """Whether the figure reaches it."""
        return figure >= self.value if self.relation == ">=" else figure <= self.value


@dataclass
class Measurement:
    """One line of a result.

    Attributes:
        name: What was done.
        unit: Of the samples: ``"s"`` or a word.
        samples: For each side, one number a round.
        ratio: The sides ``(a, b)`` whose quotient ``a / b`` is reported, or None.
        aim: What should be reached, or None.
        note: What a reader must know to believe it: a sentence.
        drawn: Whether the picture shows it.
    """

    name: str
    unit: str
    samples: Samples
    ratio: tuple[str, str] | None = (PEFT, LORAKIT)
    aim: Aim | None = None
    note: str = ""
    drawn: bool = True

    def to_json(self) -> dict[str, Any]:
        """Summaries of both sides, and of the ratio taken round by round."""
        result: dict[str, Any] = {
            "name": self.name,
            "unit": self.unit,
            "drawn": self.drawn,
            "sides": {side: summary(values) for side, values in self.samples.items()},
        }
        if self.ratio is not None:
            a, b = self.ratio
            result["ratio"] = {"of": f"{a} / {b}", **summary(quotients(self.samples[a], self.samples[b]))}
        if self.aim is not None:
            figure = result["ratio"] if self.aim.of == "ratio" else result["sides"][self.aim.of]
            result["aim"] = {**asdict(self.aim), "met": self.aim.met(figure["median"])}
        if self.note:
            result["note"] = self.note
        return result


@dataclass
class Benchmark:
    """One question and its answers; made by `start`, ended by `finish`."""

    name: str
    question: str
    quick: bool
    threads: int
    json: Path | None
    measurements: list[Measurement] = field(default_factory=list)
    load_before: tuple[float, ...] = ()

    def rounds(self, full: int) -> int:
        """How many rounds to measure: three in a quick run, which only proves that the file works."""
        return min(full, 3) if self.quick else full

    def measure(
        self, sides: Mapping[str, Side | Run], *, rounds: int, warmup: int = 2, at_least: float = 0.01
    ) -> Samples:
        """Seconds per run for each side and round, sides taking turns.

        Args:
            sides: What to compare.
            rounds: Rounds that count.
            warmup: Rounds before them that do not.
            at_least: Seconds that one timing lasts: a side that is faster is repeated within it.
        """
        each = {name: side if isinstance(side, Side) else Side(side) for name, side in sides.items()}
        least = min(at_least, 0.002) if self.quick else at_least
        gc.collect()
        gc.freeze()  # what is here now stays: the collections before each timing need not look at it again
        for _ in range(1 if self.quick else warmup):
            for side in each.values():
                _time(side, 1)
        loops = {name: _loops_for(side, least) if side.repeatable else 1 for name, side in each.items()}
        samples: Samples = {name: [] for name in each}
        for _ in range(self.rounds(rounds)):
            for name, side in each.items():
                samples[name].append(_time(side, loops[name]))
        return samples

    def add(
        self,
        name: str,
        samples: Samples,
        *,
        unit: str = "s",
        ratio: tuple[str, str] | None = (PEFT, LORAKIT),
        aim: Aim | None = None,
        note: str = "",
        drawn: bool = True,
    ) -> None:
        """Record one line, see `Measurement`, and print it as it comes."""
        measurement = Measurement(name, unit, samples, ratio, aim, note, drawn)
        self.measurements.append(measurement)
        print(line(measurement.to_json()), flush=True)

    def finish(self) -> dict[str, Any]:
        """The whole result, written as JSON if that was asked for."""
        result = {
            "benchmark": self.name,
            "question": self.question,
            "quick": self.quick,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "git": git_revision(),
            "machine": {
                **machine(),
                "threads": self.threads,
                "load_average_before": self.load_before,
                "load_average_after": load_average(),
            },
            "versions": versions(),
            "measurements": [m.to_json() for m in self.measurements],
        }
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            self.json.write_text(json.dumps(result, indent=2) + "\n")
            print(f"wrote {self.json}")
        return result


def run_child(benchmark: str, plan: Mapping[str, Any]) -> str:
    """What ``python -m benchmarks.NAME --child PLAN`` prints: a measurement in a process of its own.

    Raises:
        SystemExit: It failed; with its last words.
    """
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--child", json.dumps(plan)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    if done.returncode:
        raise SystemExit(f"{benchmark} failed for {dict(plan)}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def main_or_child(main: Callable[[], object], child: Callable[[dict[str, Any]], object]) -> None:
    """What a file does that is run: measure what `run_child` asks it for, or everything."""
    if "--child" in sys.argv:
        child(json.loads(sys.argv[sys.argv.index("--child") + 1]))
    else:
        main()


def start(name: str, question: str, argv: Sequence[str] | None = None) -> Benchmark:
    """Read the command line, set the threads, and print the question."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=question)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument(
        "--quick", action="store_true", help="three short rounds: a check that it runs, no result"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1: least noise)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    # Libraries' advice on our deliberately odd little models would drown the table.
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    print(f"\n{question}\n{HEADER}")
    return Benchmark(name, question, options.quick, options.threads, options.json, load_before=load_average())


# ---- timing ---------------------------------------------------------------------------------------------------------
def _time(side: Side, loops: int) -> float:
    """Seconds per run."""
    if side.before is not None:
        side.before()
    run = side.run
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin = time.perf_counter()
        for _ in range(loops):
            run()
        seconds = time.perf_counter() - begin
    finally:
        if collecting:
            gc.enable()
    if side.after is not None:
        side.after()
    return seconds / loops


def _loops_for(side: Side, at_least: float) -> int:
    """How often to run a side in one timing for it to last long enough."""
    loops = 1
    while (seconds := _time(side, loops) * loops) < at_least:
        loops = max(loops + 1, min(loops * 10, round(loops * 1.2 * at_least / max(seconds, 1e-9))))
    return loops


# ---- arithmetic -----------------------------------------------------------------------------------------------------
def quotients(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """``a / b``, round by round."""
    return [x / y if y else float("inf") for x, y in zip(a, b, strict=True)]


def over_base(samples: Samples) -> Samples:
    """What each side adds to the bare base of the same round."""
    base = samples[BASE]
    return {
        name: [value - b for value, b in zip(values, base, strict=True)]
        for name, values in samples.items()
        if name != BASE
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes, quartiles and number of some samples."""
    ordered = sorted(values)
    q1, _, q3 = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "q1": q1,
        "q3": q3,
        "n": len(ordered),
    }


# ---- printing -------------------------------------------------------------------------------------------------------
HEADER = f"{'':60s} {'lorakit':>12s} {'PEFT':>12s}   ratio (quartiles)"


def line(measurement: Mapping[str, Any]) -> str:
    """One measurement as a line of text."""
    sides, unit = measurement["sides"], measurement["unit"]
    cells = [number(sides[s]["median"], unit) if s in sides else "-" for s in (LORAKIT, PEFT)]
    others = [f"{s} {number(v['median'], unit)}" for s, v in sides.items() if s not in (LORAKIT, PEFT)]
    text = f"{measurement['name']:60s} {cells[0]:>12s} {cells[1]:>12s}"
    if "ratio" in measurement:
        r = measurement["ratio"]
        text += f"   {r['of']} = {digits(r['median'])} ({digits(r['q1'])} to {digits(r['q3'])})"
    if "aim" in measurement:
        aim = measurement["aim"]
        what = "" if aim["of"] == "ratio" else aim["of"] + " "
        text += f"   aim {what}{aim['relation']} {aim['value']:.3g}: {'met' if aim['met'] else 'MISSED'}"
    return text + (f"   [{', '.join(others)}]" if others else "")


def digits(value: float) -> str:
    """Three digits, and no powers of ten: ``0.0123``, ``1.23``, ``12,300``."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{round(value, 2 - int(math.log10(abs(value)))):,.0f}"


def number(value: float, unit: str) -> str:
    """A figure with its unit."""
    if unit != "s":
        return f"{digits(value)} {unit}"
    for size, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= size:
            return f"{digits(value / size)} {name}"
    return f"{digits(value / 1e-9)} ns"
