"""How much memory does an adapter take that is ready to run, over what its tensors alone would take?

A server in a process of its own loads more and more adapters; what the process holds is read after each load, when
every answer has been given. The slope over the number of adapters is one adapter's share. The room for keys and values
has been written to before: it is the same for any number of adapters.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import LORAKIT, Aim, Benchmark, main_or_child, run_child, start
from benchmarks.qlora_memory import give_back, resident
from benchmarks.serving.adapters import base_folder, make_adapters
from benchmarks.serving.engines import Lorakit
from benchmarks.serving.load import make_load

COUNTS = (8, 16, 32, 48, 64)
RANKS = (8, 64)


def main(argv: Sequence[str] | None = None) -> Benchmark:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--models", nargs="+", default=["smollm2"], help="built-in names or folders")
    parser.add_argument("--runners", nargs="+", default=["auto"], choices=["auto", "native", "transformers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where adapters are made, and kept")
    ours, rest = parser.parse_known_args(argv)
    bench = start("serve_memory", __doc__ or "", rest)
    counts = [2, 4, 6] if bench.quick else list(COUNTS)
    with tempfile.TemporaryDirectory() as scratch:
        for model in ours.models:
            for r in RANKS:
                folder = (ours.work or Path(scratch)) / f"{Path(model).name}-r{r}"
                make_adapters(folder, model, (r,), max(counts))
                for runner in ours.runners:
                    plan = {"model": model, "folder": str(folder), "counts": counts, "runner": runner,
                            "threads": bench.threads}  # fmt: skip
                    rows = [
                        json.loads(run_child("serve_memory", plan).splitlines()[-1])
                        for _ in range(bench.rounds(ours.rounds))
                    ]
                    report(bench, f"{Path(model).name}, rank {r}", rows)
    bench.finish()
    return bench


def report(bench: Benchmark, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """One adapter's share over its tensors, and what the server counts itself."""
    shares = [slope(row["resident"]) / row["tensors"] for row in rows]
    size = rows[0]["tensors"] / 1e6
    counted = rows[0]["prepared"] / rows[0]["tensors"]
    bench.add(
        f"{name}: memory over tensors", {LORAKIT: shares}, unit="times", ratio=None, aim=Aim(LORAKIT, "<=", 1.1),
        note=f"The tensors of one have {size:.2f} MB; what the runner prepares has {counted:.2f} times that. "
        f"Run by {rows[0]['runner']}.",
    )  # fmt: skip


def slope(points: Sequence[tuple[int, int]]) -> float:
    """Bytes for each adapter more: least squares."""
    return statistics.linear_regression([n for n, _ in points], [size for _, size in points]).slope


def child(plan: dict[str, Any]) -> None:
    folder = Path(plan["folder"])
    engine = Lorakit(
        base_folder(plan["model"]), folder, plan["threads"], runner=plan["runner"], weights="fp32"
    )
    server = engine.server
    # Room for keys and values is there once, however many adapters; requests would touch it bit by bit.
    server.runner.arena.keys.zero_()
    server.runner.arena.values.zero_()
    held: list[tuple[int, int]] = []
    try:
        for n in plan["counts"]:
            load = make_load(n, "distinct", max(n, 16), vocabulary=server.runner.vocabulary)
            engine.run(load, 16)  # all answer, so that whatever a step keeps for an adapter is there
            gc.collect()
            give_back()
            held.append((n, resident("VmRSS")))
        lease = server.store.acquire("a0000").result()
        with lease:
            tensors = lease.version.bytes
            prepared = getattr(server.runner, "prepared_bytes", lambda version: version.bytes)(lease.version)
    finally:
        engine.close()
    print(json.dumps({"resident": held, "tensors": tensors, "prepared": prepared, "runner": server.note}))


if __name__ == "__main__":
    main_or_child(main, child)
