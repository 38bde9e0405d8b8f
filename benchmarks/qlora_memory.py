"""How much memory do the weights of SmolLM2-135M and a few training steps take, dense and quantised?"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import LORAKIT, Benchmark, start

MODEL, RANK, ROWS, TOKENS, STEPS = "smollm2", 8, 2, 128, 3
# What the child keeps its base in: a dtype, and perhaps a storage.
BASES = {
    "float32": ("float32", ""),
    "bfloat16": ("bfloat16", ""),
    "int8": ("float32", "int8"),
    LORAKIT: ("float32", "nf4"),
}


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("qlora_memory", __doc__ or "", argv)
    weights: dict[str, list[float]] = {name: [] for name in BASES}
    peaks: dict[str, list[float]] = {name: [] for name in BASES}
    for _ in range(bench.rounds(3)):
        for name, base in BASES.items():
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.qlora_memory", "--child", *base, str(bench.threads)],
                capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parent.parent,
            )  # fmt: skip
            held, peak = done.stdout.split()[-2:]
            weights[name].append(float(held) / 1e6)
            peaks[name].append(float(peak) / 1e6)
    ratio = ("float32", LORAKIT)
    bench.add(
        "weights of the base, lorakit's in NF4", weights, unit="MB", ratio=ratio, drawn=False,
        note="All parameters and buffers but those of the adapter; the embedding, tied to the head, stays dense.",
    )  # fmt: skip
    bench.add(
        "peak of training steps", peaks, unit="MB", ratio=ratio, drawn=False,
        note=f"Resident memory over that of an empty process with torch, {STEPS} steps of AdamW on {ROWS} x {TOKENS} "
        f"tokens, LoRA of rank {RANK} on all linear layers; counted after the base is loaded and quantised.",
    )  # fmt: skip
    bench.finish()
    return bench


def child(dtype: str, storage: str, threads: int) -> tuple[int, int]:
    """Bytes of the base, and the peak of training over what the process had before it loaded anything."""
    import torch

    import lorakit as lk
    from lorakit.models import load_model
    from lorakit.targets.counting import base_bytes

    torch.set_num_threads(threads)
    before = resident("VmRSS")
    model = load_model(MODEL, dtype=dtype, device="cpu")
    # The weights are pages of the mapped file: they would be counted when they are read, and as long as one is in use.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    if storage:
        lk.quantize(model, storage)
    lk.attach(model, lk.LoRA(r=RANK), seed=0)
    model.train()
    gc.collect()
    give_back()
    forget_peak()
    optimizer = torch.optim.AdamW(lk.trainable(model).values(), lr=1e-4)
    ids = torch.randint(1000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss), "the loss is not finite"
    return base_bytes(model), resident("VmHWM") - before


def resident(what: str) -> int:
    """A figure of this process's memory in bytes, as Linux tells it: ``VmRSS`` now, ``VmHWM`` at the most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status does not tell {what}: this benchmark needs Linux.")


def forget_peak() -> None:
    """Begin ``VmHWM`` anew."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """Return freed memory to the system, so that what loading took for a moment is not counted."""
    import ctypes

    ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    if "--child" in sys.argv:
        at = sys.argv.index("--child")
        print(*child(sys.argv[at + 1], sys.argv[at + 2], int(sys.argv[at + 3])))
    else:
        main()
