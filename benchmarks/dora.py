"""What does DoRA cost at one layer of width 1024, rank 16, and what does it add to plain LoRA?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.forward import plain, step
from benchmarks.harness import BASE, LORAKIT, PEFT, Benchmark, start
from benchmarks.subjects import both, check_changes, check_equal, linear_holder

WIDTH, RANK = 1024, 16


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("dora", __doc__ or "", argv)
    model = linear_holder(WIDTH).requires_grad_(False)
    for tokens in (16, 128):
        x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(2))
        trained = x.clone().requires_grad_(True)
        for training in (False, True):
            ours, theirs = both(model, ["q"], training=training, r=RANK, lora_alpha=RANK, use_dora=True)
            lora, _ = both(model, ["q"], training=training, r=RANK, lora_alpha=RANK)
            layers = {BASE: model.q, LORAKIT: ours.q, PEFT: theirs.base_model.model.q, "lorakit LoRA": lora.q}
            with torch.no_grad():
                check_equal(ours.q(x), theirs.base_model.model.q(x), "DoRA")
                check_changes(ours.q(x), model.q(x), "DoRA")
            make, given = (step, trained) if training else (plain, x)
            samples = bench.measure(
                {n: make(layer, given) for n, layer in layers.items()}, rounds=30, at_least=0.02
            )
            word = "step" if training else "forward"
            bench.add(f"DoRA {word}, T={tokens}", samples)
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
