"""How long does it take to save the adapter of 168 layers?"""

from __future__ import annotations

from collections.abc import Sequence

from safetensors.torch import load_file, save_file

import lorakit as lk
from benchmarks.harness import LORAKIT, PEFT, Benchmark, start
from benchmarks.subjects import LINEARS, SITES, both, folder, transformers_llama


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("save", __doc__ or "", argv)
    ours, theirs = both(transformers_llama(), LINEARS, r=8, lora_alpha=16)
    with folder() as directory:
        lk.save(ours, directory / "ours")
        theirs.save_pretrained(directory / "theirs")
        tensors = load_file(directory / "theirs" / "adapter_model.safetensors")
        if set(tensors) != set(load_file(directory / "ours" / "adapter_model.safetensors")):
            raise SystemExit("The two files hold different tensors; nothing was measured.")
        sides = {
            LORAKIT: lambda: lk.save(ours, directory / "ours"),
            PEFT: lambda: theirs.save_pretrained(directory / "theirs"),
            "safetensors alone": lambda: save_file(tensors, directory / "raw.safetensors"),
        }
        bench.add(
            f"save {SITES} layers",
            bench.measure(sides, rounds=30),
            note="lorakit flushes to the disk and replaces the old files atomically; PEFT also writes a model card.",
        )
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
