"""What does a batch of 16 rows with 8 different adapters cost, one token a row, at 168 layers?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import lorakit as lk
from benchmarks.harness import BASE, LORAKIT, PEFT, Benchmark, quotients, start
from benchmarks.subjects import (
    LINEARS,
    SITES,
    check_changes,
    check_equal,
    folder,
    transformers_llama,
    with_peft,
)

ROWS, ADAPTERS = 16, 8
NAMES = [f"a{i}" for i in range(ADAPTERS)]


def both_with_adapters() -> tuple[nn.Module, nn.Module, Any]:
    """The bare base, and the model with 8 different adapters under lorakit and under PEFT."""
    from peft import LoraConfig

    base = transformers_llama()
    theirs = with_peft(base, LINEARS, r=8, lora_alpha=16)
    for name in NAMES:
        theirs.add_adapter(
            name, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, init_lora_weights=False)
        )
    theirs.delete_adapter("default")
    theirs.set_adapter(NAMES[0])
    ours = transformers_llama()
    with folder() as directory:
        theirs.save_pretrained(directory, selected_adapters=NAMES)
        for name in NAMES:
            lk.load(ours, directory / name, name=name)
    return base, ours, theirs.eval()


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("mixed_batch", __doc__ or "", argv)
    base, ours, theirs = both_with_adapters()
    ids = torch.arange(ROWS).reshape(ROWS, 1)
    orders = {
        "rows sorted by adapter": [NAMES[i * ADAPTERS // ROWS] for i in range(ROWS)],
        "rows in turn": [NAMES[i % ADAPTERS] for i in range(ROWS)],
    }
    with torch.no_grad():
        for what, rows in orders.items():
            with lk.use(ours, rows=rows):
                mixed = ours(ids).logits
            check_changes(mixed, base(ids).logits, what)
            check_equal(mixed, theirs(ids, adapter_names=rows).logits, what)

            def ours_mixed(rows: list[str] = rows) -> None:
                with lk.use(ours, rows=rows):
                    ours(ids)

            sides = {
                BASE: lambda: base(ids),
                LORAKIT: ours_mixed,
                PEFT: lambda rows=rows: theirs(ids, adapter_names=rows),
                f"{LORAKIT} single": lambda: ours(ids),
                f"{PEFT} single": lambda: theirs(ids),
            }
            samples = bench.measure(sides, rounds=20)
            bench.add(f"mixed batch, {what} ({SITES} layers)", samples)
            relative = {who: quotients(samples[who], samples[f"{who} single"]) for who in (LORAKIT, PEFT)}
            bench.add(f"mixed / one adapter for all, {what}", relative, unit="x", ratio=None)
        single = {BASE: samples[BASE], **{who: samples[f"{who} single"] for who in (LORAKIT, PEFT)}}
        bench.add(f"one adapter for all rows ({SITES} layers)", single)
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
