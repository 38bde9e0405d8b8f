"""Freed memory stays while it is wanted, and goes back after that."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorakit.train.heap import kept_heap

CHILD = """
import torch
from pathlib import Path
from lorakit.train.heap import kept_heap

def resident():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS"))
    return int(line.split()[1]) / 1024

torch.ones(10)
before = resident()
with kept_heap() as kept:
    tensors = [torch.ones(2**21) for _ in range(25)]
    del tensors
    print(kept, resident() - before)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_and_goes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, timeout=120
    )
    kept, inside, after = done.stdout.split()
    if kept == "False":
        pytest.skip("this C library cannot do it")
    assert float(inside) > 150
    assert float(after) < 50


def test_not_wanted() -> None:
    with kept_heap(False) as kept:
        assert kept is False
