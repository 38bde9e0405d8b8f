"""How much later does the first token of a cold adapter come than that of a hot one, and whom does its loading delay?

A hot adapter is ready to run; a cold one has never been read (its file is in the system's cache, as after a copy). Both
are asked the same in turn: by nobody else, and beside answers of other adapters that go on all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.harness import LORAKIT, Aim, Benchmark, start
from benchmarks.serving.adapters import base_folder, make_adapters
from benchmarks.serving.engines import Lorakit
from benchmarks.serving.load import Asked, make_load

ROUNDS, RANKS, BESIDE = 15, (8, 64), 8
PROMPT_TOKENS = 32
COLD, HOT = "cold", "hot"


def main(argv: Sequence[str] | None = None) -> Benchmark:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--runner", default="auto", choices=["auto", "native", "transformers"])
    parser.add_argument("--work", type=Path, help="where adapters are made, and kept")
    ours, rest = parser.parse_known_args(argv)
    bench = start("serve_cold", __doc__ or "", rest)
    rounds = bench.rounds(ROUNDS)
    with tempfile.TemporaryDirectory() as scratch:
        for r in RANKS:
            folder = (ours.work or Path(scratch)) / f"{Path(ours.model).name}-r{r}"
            # The first is hot, the next are those beside it, each further one is asked once.
            make_adapters(folder, ours.model, (r,), 1 + BESIDE + 2 * rounds)
            for beside in (0, BESIDE):
                engine = Lorakit(
                    base_folder(ours.model), folder, bench.threads, runner=ours.runner, weights="fp32"
                )
                try:
                    waits, paces = asyncio.run(_measure(engine, rounds, beside))
                finally:
                    engine.close()
                where = f"rank {r}, " + (f"beside {beside} answers" if beside else "alone")
                bench.add(
                    f"first token, {where}", waits, ratio=(COLD, HOT), note=f"Run by {engine.server.note}."
                )
                more = [cold - hot for cold, hot in zip(waits[COLD], waits[HOT], strict=True)]
                bench.add(
                    f"cold minus hot, {where}", {LORAKIT: more}, ratio=None, aim=Aim(LORAKIT, "<=", 0.1)
                )
                if beside:
                    bench.add(f"longest pause of the others, {where}", paces, ratio=(COLD, HOT))
    bench.finish()
    return bench


async def _measure(
    engine: Lorakit, rounds: int, beside: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds to the first token of either kind, and the others' longest pause meanwhile, by round."""
    vocabulary = engine.server.runner.vocabulary
    prompt = [token % vocabulary for token in range(100, 100 + PROMPT_TOKENS)]
    waits: dict[str, list[float]] = {HOT: [], COLD: []}
    pauses: dict[str, list[float]] = {HOT: [], COLD: []}
    came: list[float] = []
    others = [asyncio.ensure_future(_go_on(engine, 1 + i, came)) for i in range(beside)]
    try:
        await _first(engine, Asked(prompt, 2, 0))
        while beside and len(came) < 4 * beside:
            await asyncio.sleep(0.01)
        for i in range(rounds):
            for kind, adapter in ((HOT, 0), (COLD, 1 + BESIDE + i)):
                came.clear()
                began = time.perf_counter()
                waits[kind].append(await _first(engine, Asked(prompt, 2, adapter)))
                steps = sorted({began, *came, time.perf_counter()})
                pauses[kind].append(max(b - a for a, b in pairwise(steps)))
    finally:
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return waits, pauses


async def _first(engine: Lorakit, one: Asked) -> float:
    await engine.ask(one)
    assert one.first is not None
    return one.first - one.submitted


async def _go_on(engine: Lorakit, adapter: int, came: list[float]) -> None:
    """One answer after the other, each token noted."""
    (shape,) = make_load(1, requests=1, seed=adapter, vocabulary=engine.server.runner.vocabulary)
    while True:
        one = Asked(shape.prompt, 60, adapter)
        await engine.ask(one, noted=came)


if __name__ == "__main__":
    main()
