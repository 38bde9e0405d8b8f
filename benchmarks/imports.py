"""What does importing the library add to importing torch?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.harness import BASE, LORAKIT, PEFT, Aim, Benchmark, start

# Told by the process itself: the seconds of `import torch`, of the second import after it, and the modules it brought.
PROGRAM = """
import sys, time
begin = time.perf_counter()
import torch
middle = time.perf_counter()
before = len(sys.modules)
{statement}
print(middle - begin, time.perf_counter() - middle, len(sys.modules) - before)
"""
# lorakit's names are brought in when they are first used: the star asks for all of them.
STATEMENTS = {BASE: "pass", LORAKIT: "from lorakit import *", PEFT: "import peft"}


def in_fresh_process(statement: str) -> tuple[float, float, int]:
    """Seconds for torch, seconds for the statement after it, and modules that the statement added."""
    # Byte code may be kept, as it is for every installed package.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(statement=statement)],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    torch_seconds, seconds, modules = done.stdout.split()[-3:]
    return float(torch_seconds), float(seconds), int(modules)


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("imports", __doc__ or "", argv)
    added: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    whole: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    modules: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for statement in STATEMENTS.values():  # byte code and the disk's cache
        in_fresh_process(statement)
    for _ in range(bench.rounds(9)):
        for name, statement in STATEMENTS.items():
            torch_seconds, seconds, count = in_fresh_process(statement)
            added[name].append(seconds)
            whole[name].append(torch_seconds + seconds)
            modules[name].append(count)
    bench.add(
        "import, after torch",
        {name: added[name] for name in (LORAKIT, PEFT)},
        aim=Aim("ratio", ">=", 20),
        note="Timed inside fresh processes, right after `import torch`; of lorakit, everything public is imported.",
    )
    bench.add("import torch and the library", whole, drawn=False)
    bench.add(
        "modules that the import adds", {n: modules[n] for n in (LORAKIT, PEFT)}, unit="modules", drawn=False
    )
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
