"""Does the number of adapters, or how they are asked for, change how much is served?

0 to 1000 adapters on two bases, asked for in Punica's four shapes: each request its own adapter (distinct), all alike
(uniform), each half as often again as the next (skewed), all the same (identical). Each load is run twice: the first
time reads the adapters, the second finds them in memory, and is what is reported; the first is told beside it.
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

from benchmarks.harness import LORAKIT, Aim, Benchmark, main_or_child, number, run_child, start
from benchmarks.serving.adapters import base_folder, make_adapters
from benchmarks.serving.engines import Lorakit
from benchmarks.serving.load import facts, make_load

MODELS = ("smollm2",)
COUNTS = (0, 1, 20, 100, 1000)
SHAPES = ("distinct", "uniform", "skewed", "identical")
RANK, TOGETHER, REQUESTS = 8, 16, 64


def main(argv: Sequence[str] | None = None) -> Benchmark:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="built-in names or folders")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--runner", default="auto", choices=["auto", "native", "transformers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where adapters are made, and kept")
    ours, rest = parser.parse_known_args(argv)
    bench = start("serve_shapes", __doc__ or "", rest)
    counts = [0, 1, 3] if bench.quick else sorted(ours.counts)
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        for model in ours.models:
            folder = (ours.work or Path(scratch)) / f"{Path(model).name}-r{RANK}"
            make_adapters(folder, model, (RANK,), max(counts))
            for _ in range(bench.rounds(ours.rounds)):
                plan = {
                    "model": model, "folder": str(folder), "counts": counts, "shapes": ours.shapes,
                    "runner": ours.runner, "threads": bench.threads, "requests": 6 if bench.quick else REQUESTS,
                }  # fmt: skip
                printed = run_child("serve_shapes", plan).splitlines()
                for row in (json.loads(line) for line in printed if line.startswith("{")):
                    found[Path(model).name, row["shape"], row["adapters"]].append(row)
                    print(
                        f"{Path(model).name:14s} {row['adapters']:5d} {row['shape']:9s} "
                        f"{row['tokens_per_second']:8.1f} tokens/s (read first: {row['first_run']:.1f})  first token "
                        f"{number(row['first_token_p50'], 's')}, p99 {number(row['first_token_p99'], 's')}",
                        flush=True,
                    )
    report(bench, found)
    bench.finish()
    return bench


def report(bench: Benchmark, found: dict[tuple[str, str, int], list[dict[str, Any]]]) -> None:
    """Tokens a second of each load; what adapters cost against none, and 1000 of them against one."""
    for model in sorted({model for model, _, _ in found}):
        bare = [row["tokens_per_second"] for row in found[model, "uniform", 0]]
        for shape, n in sorted({(s, n) for m, s, n in found if m == model}, key=lambda key: (key[1], key[0])):
            rows = found[model, shape, n]
            speeds = [row["tokens_per_second"] for row in rows]
            waits = ", ".join(f"{number(row['first_token_p99'], 's')}" for row in rows)
            used = rows[0]["adapters_used"]
            name = f"{model}, {n} adapters" + (f", {shape}" if n else "")
            bench.add(
                name, {LORAKIT: speeds}, unit="tokens/s", ratio=None,
                note=f"{used} adapters in {rows[0]['requests']} requests; first token, 99th percentile: {waits}. "
                f"Run by {rows[0]['runner']}.",
            )  # fmt: skip
            if n:
                tax = [100 * (1 - own / without) for own, without in zip(speeds, bare, strict=True)]
                bench.add(f"{name}: tax", {LORAKIT: tax}, unit="%", ratio=None, aim=Aim(LORAKIT, "<=", 10.0))
            if n == 1000 and (model, shape, 1) in found:
                one = [row["tokens_per_second"] for row in found[model, shape, 1]]
                loss = [100 * (1 - own / single) for own, single in zip(speeds, one, strict=True)]
                bench.add(
                    f"{name}: less than one",
                    {LORAKIT: loss},
                    unit="%",
                    ratio=None,
                    aim=Aim(LORAKIT, "<=", 5.0),
                )


def child(plan: dict[str, Any]) -> None:
    model, folder = base_folder(plan["model"]), Path(plan["folder"])
    engine = Lorakit(model, folder, plan["threads"], runner=plan["runner"], weights="fp32")
    vocabulary = engine.server.runner.vocabulary
    try:
        engine.run(make_load(1, requests=4, seed=7, vocabulary=vocabulary), 4)
        for n in plan["counts"]:
            for shape in plan["shapes"] if n else ("uniform",):
                speeds: list[dict[str, Any]] = []
                for _ in range(2):
                    asked = make_load(n, shape, plan["requests"], vocabulary=vocabulary)
                    began = time.perf_counter()
                    engine.run(asked, TOGETHER)
                    speeds.append(facts(asked, began))
                first, second = speeds
                assert first["answers"] == second["answers"], "the same requests got other answers"
                row = {
                    "adapters": n,
                    "shape": shape,
                    "runner": engine.server.note,
                    "first_run": first["tokens_per_second"],
                    **second,
                }
                print(json.dumps(row), flush=True)
    finally:
        engine.close()


if __name__ == "__main__":
    main_or_child(main, child)
