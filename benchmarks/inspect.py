"""How long does it take to see what is in the adapter of a 7B model: every spectrum, rank and norm?"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import torch

import lorakit as lk
from benchmarks.harness import LORAKIT, Aim, Benchmark, Side, start
from benchmarks.subjects import folder
from lorakit.adapters import analyse, beside, spectrum
from lorakit.adapters.change import low_rank_change
from lorakit.cli.app import run
from lorakit.core import AdapterSpec, AdapterState
from lorakit.core.target import Shape
from lorakit.study.adapter_page import adapter_page

DENSE = "dense change decomposed"
WIDTH, RANK, LAYERS, LEAVES = 4096, 16, 32, ("q", "k", "v", "o", "gate", "up", "down")


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("inspect", __doc__ or "", argv)
    state = seven_billion(4 if bench.quick else LAYERS, seed=0)
    count = len(state.tensors)
    check(seven_billion(1, seed=0, width=256))
    with folder() as directory:
        lk.save(state, directory / "adapter")
        bench.add(
            f"lorakit inspect, {count} targets of {WIDTH} x {WIDTH} at r={RANK}, {state.nbytes / 1e6:.0f} MB",
            bench.measure({LORAKIT: Side(lambda: command("inspect", str(directory / "adapter")))}, rounds=7),
            ratio=None,
            aim=Aim(LORAKIT, "<=", 1.0),
            note="The command in this process, after imports: reading, every spectrum, the table.",
        )
    found, other = analyse(state), seven_billion(4 if bench.quick else LAYERS, seed=1)
    bench.add(
        "the page of it as HTML, without the analysis",
        bench.measure({LORAKIT: lambda: adapter_page({"adapter": found})}, rounds=7),
        ratio=None,
    )
    bench.add(
        "two such adapters beside each other",
        bench.measure({LORAKIT: lambda: beside(state, other)}, rounds=3),
        ratio=None,
        note="Cosine and subspace similarity of every target.",
    )
    width = 256 if bench.quick else 1024
    small = seven_billion(1, seed=0, width=width)
    path = next(iter(small.tensors))
    A, B = low_rank_change(small, path).folded()
    sides = {LORAKIT: lambda: spectrum(small, path), DENSE: lambda: torch.linalg.svdvals(B @ A)}
    bench.add(
        f"the singular values of one change of {width} x {width}",
        bench.measure(sides, rounds=7),
        ratio=(DENSE, LORAKIT),
        note="PEFT has nothing of the kind: this is what one would write by hand.",
    )
    bench.finish()
    return bench


def seven_billion(layers: int, *, seed: int, width: int = WIDTH) -> AdapterState:
    """Seven linear layers in each block, float16."""
    generator = torch.Generator().manual_seed(seed)
    method, shape = lk.LoRA(r=RANK, alpha=32), Shape("linear", out=width, in_=width)
    paths = [f"model.layers.{n}.{leaf}_proj" for n in range(layers) for leaf in LEAVES]
    tensors = {
        path: {
            name: (torch.randn(size, generator=generator) / 64).half()
            for name, size in method.shapes(shape).items()
        }
        for path in paths
    }
    return AdapterState(AdapterSpec(dict.fromkeys(paths, method), dict.fromkeys(paths, shape)), tensors)


def command(*words: str) -> None:
    """Run the program in this process, its output thrown away."""
    with contextlib.redirect_stdout(io.StringIO()):
        if run(words):
            raise SystemExit(f"lorakit {' '.join(words)} failed; nothing was measured.")


def check(state: AdapterState) -> None:
    """Nothing is timed that is not what the dense change has."""
    for path in state.tensors:
        A, B = low_rank_change(state, path).folded()
        dense, found = torch.linalg.svdvals(B @ A)[:RANK], spectrum(state, path)
        if found is None or not torch.allclose(found.values, dense, rtol=1e-10):
            raise SystemExit(f"The singular values at {path} are wrong; nothing was measured.")


if __name__ == "__main__":
    main()
