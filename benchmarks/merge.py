"""How long do merging an adapter into the weights and taking it out again take?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import lorakit as lk
from benchmarks.harness import LORAKIT, PEFT, Benchmark, Side, start
from benchmarks.subjects import (
    LINEARS,
    SITES,
    both,
    check_changes,
    check_equal,
    linear_holder,
    transformers_llama,
)


def compare(bench: Benchmark, what: str, ours: torch.nn.Module, theirs: object, rounds: int) -> None:
    merge = {LORAKIT: lambda: lk.merge(ours), PEFT: lambda: theirs.merge_adapter()}  # type: ignore[attr-defined]
    unmerge = {LORAKIT: lambda: lk.unmerge(ours), PEFT: lambda: theirs.unmerge_adapter()}  # type: ignore[attr-defined]
    merging = {who: Side(merge[who], after=unmerge[who]) for who in merge}
    bench.add(f"merge {what}", bench.measure(merging, rounds=rounds, warmup=1))
    unmerging = {who: Side(unmerge[who], before=merge[who]) for who in merge}
    bench.add(
        f"unmerge {what}",
        bench.measure(unmerging, rounds=rounds, warmup=1),
        note="To unmerge, lorakit puts back the weights it kept (which takes memory); PEFT subtracts and rounds.",
    )


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("merge", __doc__ or "", argv)
    ours, theirs = both(transformers_llama(), LINEARS, r=8, lora_alpha=16)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        with lk.use(ours, None):
            before = ours(ids).logits
        lk.merge(ours)
        theirs.merge_adapter()
        check_changes(ours(ids).logits, before, "merge")
        check_equal(ours(ids).logits, theirs(ids).logits, "merge")
        lk.unmerge(ours)
        theirs.unmerge_adapter()
    compare(bench, f"{SITES} layers", ours, theirs, rounds=15)
    width = 512 if bench.quick else 4096
    for dtype in (torch.float32, torch.bfloat16):
        model = linear_holder(width, dtype=dtype).requires_grad_(False)
        ours, theirs = both(model, ["q"], r=16, lora_alpha=16)
        word = str(dtype).removeprefix("torch.")
        compare(bench, f"one {width} x {width} layer, {word}", ours, theirs, rounds=9)
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
