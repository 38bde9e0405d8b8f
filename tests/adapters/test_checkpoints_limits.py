"""Extracting goes from tensor to tensor: what it needs of memory does not grow with the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorakit as lk

CHILD = """
import resource, sys
from pathlib import Path
from lorakit.cli.app import run
from lorakit.io.checkpoint import Checkpoint

folder, room = Path(sys.argv[1]), int(sys.argv[2])


def kilobytes(word):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(word + ":"))


def extract(name, *more):
    words = ["extract", folder / name / "base", folder / name / "tuned", "--out", folder / name / "lora", *more]
    assert run([str(word) for word in words]) == 0


extract("warm", "--rank", "2", "--fast")  # whatever is imported is there now
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
limit = 1024 * kilobytes("VmData") + room
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
extract("big", "--rank", "2", "--fast", "--rest", "save")
print("peak", 1024 * (kilobytes("VmHWM") - before))
try:
    whole = dict(Checkpoint(folder / "big" / "base"))
except (RuntimeError, MemoryError):
    print("one of the two models alone does not fit")
"""


def save_pair(folder: Path, layers: int, width: int) -> dict[str, torch.Tensor]:
    """A base, and a tuned model that differs by rank one in every layer and in a norm; the changes."""
    generator = torch.Generator().manual_seed(0)
    base, tuned, changes = {}, {}, {}
    for layer in range(layers):
        name = f"layers.{layer}.q_proj.weight"
        base[name] = torch.randn(width, width, generator=generator)
        changes[name] = torch.randn(width, 1, generator=generator) @ torch.randn(
            1, width, generator=generator
        )
        tuned[name] = base[name] + changes[name]
    base["norm.weight"], tuned["norm.weight"] = torch.ones(width), torch.full((width,), 1.5)
    for side, tensors in (("base", base), ("tuned", tuned)):
        (folder / side).mkdir(parents=True)
        save_file(tensors, folder / side / "model.safetensors")
    return changes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits data memory")
def test_the_peak_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    layers, width = 64, 1024
    one = width * width * 4  # bytes of a tensor
    save_pair(tmp_path / "warm", 1, 16)
    changes = save_pair(tmp_path / "big", layers, width)
    # Both sides, their difference in float64, what the projection makes of it; each model has 64 such tensors.
    room = 48 * one
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(room)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            # A tensor goes back when it is freed; else the gaps between the freed ones are measured, never twice alike.
            "MALLOC_MMAP_THRESHOLD_": str(one),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("peak ")[1].split()[0])
    assert 2 * one < peak < 20 * one
    assert "one of the two models alone does not fit" in done.stdout
    state = lk.read(tmp_path / "big" / "lora")
    assert len(state.tensors) == layers + 1
    path = f"layers.{layers - 1}.q_proj"
    p, method = state.tensors[path], state.spec.methods[path]
    assert isinstance(method, lk.LoRA)
    torch.testing.assert_close(
        method.scale * p["lora_B"] @ p["lora_A"], changes[f"{path}.weight"], atol=1e-3, rtol=1e-3
    )
