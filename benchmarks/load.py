"""How long does it take to load one more adapter, and to take it off, with 2 and with 13 adapters on the model?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import lorakit as lk
from benchmarks.harness import LORAKIT, PEFT, Aim, Benchmark, Side, quotients, start
from benchmarks.subjects import (
    LINEARS,
    SITES,
    check_changes,
    check_equal,
    folder,
    transformers_llama,
    with_peft,
)

FEW, MANY = 2, 13


def ours_with(count: int, directory: Path) -> nn.Module:
    """A model with ``count`` adapters ``a0``, ``a1``, ... under lorakit."""
    model = transformers_llama()
    for i in range(count):
        lk.load(model, directory, name=f"a{i}")
    return model


def theirs_with(count: int, directory: Path) -> Any:
    """The same under PEFT."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(transformers_llama(), str(directory), adapter_name="a0")
    for i in range(1, count):
        model.load_adapter(str(directory), f"a{i}")
    return model.eval()


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("load", __doc__ or "", argv)
    with folder() as directory:
        source = with_peft(transformers_llama(), LINEARS, r=8, lora_alpha=16)
        source.save_pretrained(directory)
        few, many = ours_with(FEW, directory), ours_with(MANY, directory)
        peft_few, peft_many = theirs_with(FEW, directory), theirs_with(MANY, directory)
        check(few, peft_few, directory)

        load_few = {
            LORAKIT: lambda: lk.load(few, directory, name="new"),
            PEFT: lambda: peft_few.load_adapter(str(directory), "new"),
        }
        load_many = {
            LORAKIT: lambda: lk.load(many, directory, name="new"),
            PEFT: lambda: peft_many.load_adapter(str(directory), "new"),
        }
        drop_few = {LORAKIT: lambda: lk.detach(few, "new"), PEFT: lambda: peft_few.delete_adapter("new")}
        drop_many = {LORAKIT: lambda: lk.detach(many, "new"), PEFT: lambda: peft_many.delete_adapter("new")}

        sides: dict[str, Side | Any] = {"reading the file": lambda: read_file(directory)}
        for count, load, drop in ((FEW, load_few, drop_few), (MANY, load_many, drop_many)):
            for who in (LORAKIT, PEFT):
                sides[f"{who} {count}"] = Side(load[who], after=drop[who])
        loading = bench.measure(sides, rounds=11, warmup=1)
        report(bench, "load, {} adapters present", loading, Aim("ratio", ">=", 10), Aim(LORAKIT, "<=", 1.25))

        sides = {}
        for count, load, drop in ((FEW, load_few, drop_few), (MANY, load_many, drop_many)):
            for who in (LORAKIT, PEFT):
                sides[f"{who} {count}"] = Side(drop[who], before=load[who])
        report(bench, "detach, {} other adapters present", bench.measure(sides, rounds=11, warmup=1))
    bench.finish()
    return bench


def report(
    bench: Benchmark,
    name: str,
    samples: dict[str, list[float]],
    aim: Aim | None = None,
    flat: Aim | None = None,
) -> None:
    """Both counts, and how the time grows from one to the other."""
    raw = {k: v for k, v in samples.items() if k == "reading the file"}
    for count in (FEW, MANY):
        pair = {who: samples[f"{who} {count}"] for who in (LORAKIT, PEFT)}
        bench.add(f"{name.format(count)} ({SITES} layers)", {**pair, **raw}, aim=aim)
    growth = {who: quotients(samples[f"{who} {MANY}"], samples[f"{who} {FEW}"]) for who in (LORAKIT, PEFT)}
    bench.add(f"{name.split(',')[0]}: time at {MANY} / time at {FEW}", growth, unit="x", ratio=None, aim=flat)


def read_file(directory: Path) -> None:
    """What any loader has to do: the bytes of the file, in tensors of their own."""
    for tensor in load_file(directory / "adapter_model.safetensors").values():
        tensor.clone()


def check(ours: nn.Module, theirs: Any, directory: Path) -> None:
    """The adapter that is loaded acts, and acts alike on both sides."""
    ids = torch.arange(12).reshape(2, 6)
    lk.load(ours, directory, name="new")
    theirs.load_adapter(str(directory), "new")
    theirs.set_adapter("new")
    with torch.no_grad():
        with lk.use(ours, "new"):
            adapted = ours(ids).logits
        with lk.use(ours, None):
            check_changes(adapted, ours(ids).logits, "load")
        check_equal(adapted, theirs(ids).logits, "load")
    theirs.set_adapter("a0")
    lk.detach(ours, "new")
    theirs.delete_adapter("new")


if __name__ == "__main__":
    main()
