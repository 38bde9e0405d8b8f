"""How many tokens a second does lorakit serve with 0 to 1000 adapters, beside PEFT, transformers, llama.cpp and vLLM?

Every engine answers the same requests, 16 at a time, in a process of its own; engines take turns. llama.cpp and vLLM
run where an interpreter that has them is named: ``--llamacpp PYTHON``, ``--vllm PYTHON`` (serving/others.py). Beside
SmolLM2 there is a base of a sixth of its size (serving/smaller.py), for the engines that run in Python.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import LORAKIT, Aim, Benchmark, main_or_child, number, start
from benchmarks.serving.adapters import base_folder
from benchmarks.serving.sides import (
    COUNTS,
    HALVES,
    IN_PYTHON,
    INT8,
    MANY,
    MIXED,
    OURS,
    SIDES,
    chosen,
    engine_of,
    in_a_process,
    make_all,
)
from benchmarks.serving.smaller import SMALLER, make_base

MODEL, TOGETHER, REQUESTS = "smollm2", 16, 64
MODELS = (MODEL, SMALLER)
POPULARITIES = ("uniform", "power", "skewed", "distinct")
Found = dict[tuple[str, str, str], dict[int, list[dict[str, Any]]]]


def main(argv: Sequence[str] | None = None) -> Benchmark:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--llamacpp")
    parser.add_argument("--vllm")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--only", nargs="+", choices=SIDES)
    parser.add_argument("--counts", nargs="+", type=int, default=[*COUNTS, MANY], choices=[*COUNTS, 8, MANY])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--popularities", nargs="+", default=list(POPULARITIES), choices=POPULARITIES)
    parser.add_argument("--work", type=Path, help="where adapters are made, and kept")
    ours, rest = parser.parse_known_args(argv)
    bench = start("serve_throughput", __doc__ or "", rest)
    with tempfile.TemporaryDirectory() as scratch:
        work = ours.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        sides = chosen(ours.only, ours.llamacpp, ours.vllm)
        counts = [0, 1] if bench.quick else sorted(ours.counts)
        found: Found = defaultdict(lambda: defaultdict(list))
        left_out: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
        for model in ours.models:
            base = make_base(work) if model == SMALLER else base_folder(model)
            make_all(work / model, base, max(counts), sides)
            for _ in range(bench.rounds(ours.rounds)):
                for side, python in sides.items():
                    if model != MODEL and side not in IN_PYTHON:
                        continue
                    kinds = ours.popularities if side in (LORAKIT, INT8) else ["uniform"]
                    mine = [n for n in counts if n in SIDES[side]]
                    for row in _in_a_process(side, mine, kinds, base, work / model, bench, python):
                        if "left_out" in row:
                            left_out[model, row["adapters"]][side] = row["left_out"]
                            print(
                                f"{model} {side:38s} {row['adapters']:5d} left out: {row['left_out']}",
                                flush=True,
                            )
                            continue
                        found[model, side, row["popularity"]][row["adapters"]].append(row)
                        print(
                            f"{model} {side:38s} {row['adapters']:5d} {row['popularity']:9s} "
                            f"{row['tokens_per_second']:7.1f} tokens/s  first token "
                            f"{number(row['first_token_p50'], 's')}, p99 {number(row['first_token_p99'], 's')}",
                            flush=True,
                        )
    for model in ours.models:
        mine_out = {n: why for (m, n), why in left_out.items() if m == model}
        report(bench, model, {(s, p): rows for (m, s, p), rows in found.items() if m == model}, mine_out)
    bench.finish()
    return bench


def report(
    bench: Benchmark,
    model: str,
    found: dict[tuple[str, str], dict[int, list[dict[str, Any]]]],
    left_out: dict[int, dict[str, str]],
) -> None:
    """Tokens a second of all engines for each load; what adapters cost lorakit, and its slowest first tokens."""
    of = "" if model == MODEL else f"{model}: "
    popularities = sorted({popularity for _, popularity in found}, key=lambda p: (p != "uniform", p))
    for popularity in popularities:
        counts = sorted({n for (_, p), rows in found.items() if p == popularity for n in rows})
        for n in counts:
            rows = {side: by[n] for (side, p), by in found.items() if p == popularity and n in by}
            speeds = {side: [row["tokens_per_second"] for row in mine] for side, mine in rows.items()}
            aimed = LORAKIT in speeds and model == MODEL
            aim = Aim(LORAKIT, ">=", 120.0 if n == 0 else 110.0) if aimed else None
            ratio = (LORAKIT, MIXED) if {LORAKIT, MIXED} <= set(speeds) else None
            bench.add(
                f"{of}{n} adapters, {popularity}",
                speeds,
                unit="tokens/s",
                ratio=ratio,
                aim=aim,
                note=_note(rows, left_out.get(n, {}) if popularity == "uniform" else {}),
            )
    if (LORAKIT, "uniform") in found:
        ours = found[LORAKIT, "uniform"]
        for n in sorted(ours):
            if n and 0 in ours:
                taxes = {
                    side: [
                        100 * (1 - a["tokens_per_second"] / b["tokens_per_second"])
                        for a, b in zip(found[side, "uniform"][n], ours[0], strict=True)
                    ]
                    for side in (LORAKIT, HALVES)
                    if n in found.get((side, "uniform"), {})
                }
                bench.add(
                    f"{of}tax of {n} adapters",
                    taxes,
                    unit="%",
                    ratio=None,
                    aim=Aim(LORAKIT, "<=", 10.0),
                )
        waits = {n: [row["first_token_p99"] for row in mine] for n, mine in ours.items()}
        for n, seconds in waits.items():
            bench.add(
                f"{of}first token p99, {n} adapters",
                {LORAKIT: seconds},
                ratio=None,
                aim=Aim(LORAKIT, "<=", 2.0),
            )


def _note(rows: dict[str, list[dict[str, Any]]], left_out: dict[str, str]) -> str:
    waits = "; ".join(
        f"{side} {statistics.median(r['first_token_p50'] for r in mine):.2f} / "
        f"{statistics.median(r['first_token_p99'] for r in mine):.2f} s"
        for side, mine in rows.items()
    )
    without = "".join(f" Without {side}: {why}." for side, why in left_out.items())
    return f"First token, median and 99th percentile: {waits}.{without}"


def _in_a_process(
    side: str,
    counts: Sequence[int],
    kinds: Sequence[str],
    base: Path,
    work: Path,
    bench: Benchmark,
    python: str | None,
) -> list[dict[str, Any]]:
    """Rows of one side. Those that hold all adapters at once load as many as they are asked for, and no more."""
    rows: list[dict[str, Any]] = []
    groups = [list(counts)] if side in OURS else [[n] for n in counts]
    for group in groups:
        plan = {
            "side": side, "base": str(base), "counts": group, "work": str(work), "threads": bench.threads,
            "python": python, "popularities": list(kinds),
            "requests": 6 if bench.quick else REQUESTS,
        }  # fmt: skip
        rows += in_a_process("serve_throughput", plan)
    return rows


def child(plan: dict[str, Any]) -> None:
    from benchmarks.serving.load import facts, make_load

    for n in plan["counts"]:
        with engine_of(plan, n) as engine:
            for popularity in [] if engine is None else plan["popularities"] if n else ["uniform"]:
                engine.run(make_load(min(n, 2), requests=2, seed=7), 2)
                asked = make_load(n, popularity, plan["requests"])
                began = time.perf_counter()
                engine.run(asked, TOGETHER)
                row = {"side": plan["side"], "adapters": n, "popularity": popularity, **facts(asked, began)}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main_or_child(main, child)
