"""How long do people wait, and how much is done, when requests come by themselves, as in S-LoRA's paper?

S-LoRA's synthetic workload at the size of two cores: requests for adapters of a power law's popularity (number
``n * x ** (1 / alpha)``), in Gamma-distributed steps with a rate and a coefficient of variation (1 is Poisson, more
comes in bursts), for a time. Nobody waits for anybody else's answer, so an engine that is asked for more than it can
do falls behind. "In time" is S-LoRA's: the first token within six seconds. Engines: see serve_throughput.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark, main_or_child, number, start
from benchmarks.serving.adapters import base_folder
from benchmarks.serving.load import facts, make_load
from benchmarks.serving.sides import (
    COUNTS,
    MANY,
    SIDES,
    chosen,
    engine_of,
    in_a_process,
    make_all,
)

MODEL, SECONDS, RATES, ALPHA, CV = "smollm2", 60.0, (0.5, 2.0), 0.3, 1.0
Rows = dict[str, list[dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> Benchmark:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--llamacpp")
    parser.add_argument("--vllm")
    parser.add_argument("--only", nargs="+", choices=SIDES)
    parser.add_argument("--counts", nargs="+", type=int, default=[20], choices=[*COUNTS, 8, MANY])
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="requests a second")
    parser.add_argument("--cv", type=float, default=CV, help="of the steps between them")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="of the power law; 1 is uniform")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where adapters are made, and kept")
    ours, rest = parser.parse_known_args(argv)
    bench = start("serve_arrivals", __doc__ or "", rest)
    counts, seconds = ([1], 3.0) if bench.quick else (sorted(ours.counts), ours.seconds)
    found: dict[tuple[int, float], Rows] = defaultdict(lambda: defaultdict(list))
    left_out: dict[int, dict[str, str]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as scratch:
        work = (ours.work or Path(scratch)) / MODEL
        work.mkdir(parents=True, exist_ok=True)
        base = base_folder(MODEL)
        sides = chosen(ours.only, ours.llamacpp, ours.vllm)
        make_all(work, base, max(counts), sides)
        for _ in range(1 if bench.quick else ours.rounds):
            for side, python in sides.items():
                for n in (n for n in counts if n in SIDES[side]):
                    plan = {
                        "side": side, "base": str(base), "counts": [n], "work": str(work), "python": python,
                        "threads": bench.threads, "rates": ours.rates, "cv": ours.cv, "alpha": ours.alpha,
                        "seconds": seconds,
                    }  # fmt: skip
                    for row in in_a_process("serve_arrivals", plan):
                        _tell(side, n, row)
                        if "left_out" in row:
                            left_out[n][side] = row["left_out"]
                        else:
                            found[n, row["rate"]][side].append(row)
    about = f"Popularity by a power law with alpha {ours.alpha:g}; coefficient of variation {ours.cv:g}."
    for (n, rate), rows in sorted(found.items()):
        without = "".join(f" Without {side}: {why}." for side, why in left_out[n].items())
        report(bench, f"{n} adapters, {rate:g} requests a second", rows, about + without)
    bench.finish()
    return bench


def report(bench: Benchmark, name: str, rows: Rows, about: str) -> None:
    """What was done, and how long the first tokens took."""
    asked = next(iter(rows.values()))[0]
    came = f"{asked['requests']} requests for {asked['adapters_used']} adapters, {asked['tokens']} tokens of answers."
    for side, mine in rows.items():
        if missing := max(row["unanswered"] for row in mine):
            came += f" {side} left {missing} unanswered."
    for what, key, unit in (
        ("done", "tokens_per_second", "tokens/s"),
        ("first token, median", "first_token_p50", "s"),
        ("first token, 99th percentile", "first_token_p99", "s"),
        ("in time", "within_six_seconds", "share"),
    ):
        samples = {side: [row[key] for row in mine] for side, mine in rows.items()}
        bench.add(f"{name}: {what}", samples, unit=unit, ratio=None, note=f"{came} {about}")


def _tell(side: str, n: int, row: dict[str, Any]) -> None:
    if "left_out" in row:
        print(f"{side:45s} {n:5d} left out: {row['left_out']}", flush=True)
        return
    without = f", unanswered {row['unanswered']}" if row["unanswered"] else ""
    print(
        f"{side:45s} {n:5d} {row['rate']:5g}/s {row['tokens_per_second']:7.1f} tokens/s  first token "
        f"{number(row['first_token_p50'], 's')}, p99 {number(row['first_token_p99'], 's')}, in time "
        f"{row['within_six_seconds']:.0%}{without}",
        flush=True,
    )


def child(plan: dict[str, Any]) -> None:
    (n,) = plan["counts"]
    with engine_of(plan, n) as engine:
        if engine is None:
            return
        engine.run(make_load(min(n, 2), requests=2, seed=7), 2)
        for rate in plan["rates"]:
            requests = max(1, round(rate * plan["seconds"]))
            asked = make_load(n, "power", requests, alpha=plan["alpha"], rate=rate, cv=plan["cv"])
            began = time.perf_counter()
            engine.run(asked, None)
            told = facts(asked, began, all_answered=False)
            row = {"side": plan["side"], "adapters": n, "rate": rate, **told}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main_or_child(main, child)
