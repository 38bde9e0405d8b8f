"""Where a benchmark ran, and with what: nobody can judge a figure without it."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lorakit.ops.native.load import status


def machine() -> dict[str, Any]:
    """CPU, cores and operating system."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "usable_cores": len(affinity(0)) if affinity else os.cpu_count(),
        "os": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that matter here."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "peft", "transformers", "safetensors", "accelerate", "bitsandbytes", "lorakit"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if found["lorakit"] is None:  # run from a source tree
        import lorakit

        found["lorakit"] = lorakit.__version__
    found["lorakit kernels"] = status().state
    return found


def git_revision() -> dict[str, Any] | None:
    """The commit, and whether the package's source differs from it; None outside a repository."""
    here = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    try:
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load_average() -> tuple[float, ...]:
    return tuple(round(value, 2) for value in os.getloadavg()) if hasattr(os, "getloadavg") else ()
