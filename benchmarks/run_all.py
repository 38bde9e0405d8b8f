"""Run every benchmark, each in a process of its own, and turn the results into the table and picture of the docs.

``python -m benchmarks.run_all`` (``make bench``). With ``--quick`` it only checks that they run, and keeps nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import NAMES, table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_all", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="three short rounds each: a check that they run, no result"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1: least noise)")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help=f"where to write the JSON (default {RESULTS})"
    )
    options = parser.parse_args(argv)
    if options.quick and options.results is None:
        with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as scratch:
            return run(options.only, Path(scratch), options.threads, quick=True)
    results = options.results or RESULTS
    failed = run(options.only, results, options.threads, quick=options.quick)
    if not options.quick and options.results is None:
        table.main([])
    return failed


def run(names: Sequence[str], results: Path, threads: int, *, quick: bool) -> int:
    """Run each; the number of those that failed. A failure does not keep the others from running."""
    failed = []
    for name in names:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(results / f"{name}.json")]
        command += ["--threads", str(threads), *(["--quick"] if quick else [])]
        begin = time.perf_counter()
        if subprocess.run(command, cwd=HERE.parent, check=False).returncode:
            failed.append(name)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
