"""What does merging a LoRA into a checkpoint of 190M parameters cost in time and memory, beside loading the model?"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import LORAKIT, PEFT, Benchmark, start
from benchmarks.qlora_memory import forget_peak, resident

WIDTH, LAYERS, TOKENS, RANK = 768, 12, 50_000, 16
IN_MEMORY = "lorakit, model loaded"
MEASURED = "lorakit, rounding measured"
SIDES = (LORAKIT, PEFT, MEASURED, IN_MEMORY)


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("streaming_merge", __doc__ or "", argv)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as scratch:
        largest = save(Path(scratch))
        for _ in range(bench.rounds(5)):
            for side in SIDES:
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.streaming_merge", "--child", side, scratch, str(bench.threads)],
                    capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parent.parent,
                )  # fmt: skip
                took, peak = done.stdout.split()[-2:]
                seconds[side].append(float(took))
                peaks[side].append(float(peak) / 1e6)
    bench.add(
        "merge into a checkpoint and save, bfloat16", seconds,
        note="Imports left out. lorakit goes from tensor to tensor and forces the file to disk; PEFT's "
        "merge_and_unload and lorakit.merge need the model loaded, and save it with save_pretrained.",
    )  # fmt: skip
    bench.add(
        "peak memory of that", peaks, unit="MB", drawn=False,
        note=f"Resident memory over that of the process with everything imported; the largest tensor has "
        f"{largest / 1e6:.0f} MB.",
    )  # fmt: skip
    bench.finish()
    return bench


def save(folder: Path) -> int:
    """A random base and an adapter of it; the bytes of the largest tensor."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lorakit as lk

    for place, width, layers, tokens in (
        (folder / "warm", 32, 1, 64),
        (folder / "big", WIDTH, LAYERS, TOKENS),
    ):
        config = LlamaConfig(
            vocab_size=tokens, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=width // 16, num_key_value_heads=width // 16, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(place / "base")
        lk.attach(model, lk.LoRA(r=RANK if width > 32 else 2), seed=0)
        with torch.no_grad():
            for parameter in lk.trainable(model).values():
                parameter.add_(0.01)
        lk.save(model, place / "adapter")
    return TOKENS * WIDTH * 2


def merge(side: str, place: Path, out: Path) -> None:
    """One side's way from a base and an adapter on the disk to a merged folder."""
    import torch
    from transformers import AutoModelForCausalLM

    if side in (LORAKIT, MEASURED):
        from lorakit.models.streaming_merge import merge_checkpoint

        merge_checkpoint(place / "base", [place / "adapter"], out, measure=side == MEASURED)
        return
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.bfloat16)
    if side == PEFT:
        from peft import PeftModel

        PeftModel.from_pretrained(model, place / "adapter").merge_and_unload().save_pretrained(out)
        return
    import lorakit as lk

    lk.load(model, place / "adapter")
    lk.merge(model, permanent=True)
    model.save_pretrained(out)


def child(side: str, folder: Path, threads: int) -> tuple[float, int]:
    """Seconds, and the peak of resident memory over what the process had after a small merge."""
    import torch

    torch.set_num_threads(threads)
    out = folder / "out"
    for place in (folder / "warm", folder / "big"):
        shutil.rmtree(out, ignore_errors=True)
        before = resident("VmRSS")
        forget_peak()
        began = time.perf_counter()
        merge(side, place, out)
        took = time.perf_counter() - began
    return took, resident("VmHWM") - before


if __name__ == "__main__":
    if "--child" in sys.argv:
        at = sys.argv.index("--child")
        print(*child(sys.argv[at + 1], Path(sys.argv[at + 2]), int(sys.argv[at + 3])))
    else:
        main()
