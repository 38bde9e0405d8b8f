"""How long does it take to convert the adapter of a 7B model, beside reading and writing its tensors alone?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from benchmarks.harness import LORAKIT, Benchmark, start
from benchmarks.subjects import folder
from lorakit.core import AdapterSpec, AdapterState
from lorakit.core.target import Shape
from lorakit.io.formats import convert, read_any, write_as

COPY = "safetensors alone"


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("convert", __doc__ or "", argv)
    state = seven_billion()
    with folder() as directory:
        write_as(state, directory / "peft", "peft")
        weights = directory / "peft" / "adapter_model.safetensors"
        for to in ("native", "kohya", "lycoris", "diffusers"):
            out = directory / (to if to == "native" else f"{to}.safetensors")
            under = "transformer" if to in ("kohya", "diffusers") else None
            check(directory / "peft", out, to, under, state)

            def run(out: Path = out, to: str = to, under: str | None = under) -> None:
                convert(directory / "peft", out, to, under=under, overwrite=True)

            def copy() -> None:
                save_file(load_file(weights), directory / "copy.safetensors")

            bench.add(
                f"PEFT to {to}, {state.nbytes / 1e6:.0f} MB, {len(state.tensors)} layers",
                bench.measure({LORAKIT: run, COPY: copy}, rounds=10),
                ratio=None,
                note="lorakit checks every tensor, flushes to the disk and replaces the file atomically.",
            )
    bench.finish()
    return bench


def seven_billion() -> AdapterState:
    """Rank 8 on q, k, v and o of 32 layers of width 4096, float16."""
    method, shape = lk.LoRA(r=8, alpha=16), Shape("linear", out=4096, in_=4096)
    paths = [f"model.layers.{n}.self_attn.{leaf}_proj" for n in range(32) for leaf in "qkvo"]
    tensors = {
        path: {name: torch.randn(size).half() for name, size in method.shapes(shape).items()}
        for path in paths
    }
    return AdapterState(AdapterSpec(dict.fromkeys(paths, method), dict.fromkeys(paths, shape)), tensors)


def check(source: Path, out: Path, to: str, under: str | None, state: AdapterState) -> None:
    """Nothing is timed that does not come back to the bit."""
    convert(source, out, to, under=under)
    again, _ = read_any(out)
    for path, group in state.tensors.items():
        found = again.tensors[f"{under}.{path}" if under else path]
        if any(not torch.equal(t, found[name]) for name, t in group.items()):
            raise SystemExit(f"{to} did not keep {path}; nothing was measured.")


if __name__ == "__main__":
    main()
