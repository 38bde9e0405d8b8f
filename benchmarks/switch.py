"""How long does it take to switch adapters on a model with 168 adapted layers?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

from torch import nn

import lorakit as lk
from benchmarks.harness import LORAKIT, PEFT, Aim, Benchmark, start
from benchmarks.load import ours_with, theirs_with
from benchmarks.subjects import LINEARS, SITES, folder, transformers_llama, with_peft


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("switch", __doc__ or "", argv)
    with folder() as directory:
        with_peft(transformers_llama(), LINEARS, r=8, lora_alpha=16).save_pretrained(directory)
        for count in (2, 13):
            ours, theirs = ours_with(count, directory), theirs_with(count, directory)
            sides = {LORAKIT: switching_ours(ours, count), PEFT: switching_theirs(theirs, count)}
            bench.add(
                f"switch the active adapter, {count} present ({SITES} layers)",
                bench.measure(sides, rounds=30),
                aim=Aim("ratio", ">=", 100),
            )
            sides = {LORAKIT: lambda m=ours: base_ours(m), PEFT: lambda m=theirs: base_theirs(m)}
            bench.add(f"a block on the base model, {count} present", bench.measure(sides, rounds=20))
            sides = {LORAKIT: lambda m=ours: other_ours(m), PEFT: lambda m=theirs: other_theirs(m)}
            bench.add(
                f"a block on another adapter and back, {count} present", bench.measure(sides, rounds=20)
            )
    bench.finish()
    return bench


def switching_ours(model: nn.Module, count: int) -> Callable[[], None]:
    names = cycle(f"a{i}" for i in range(count))
    return lambda: lk.set_active(model, next(names))


def switching_theirs(model: Any, count: int) -> Callable[[], None]:
    names = cycle(f"a{i}" for i in range(count))
    return lambda: model.set_adapter(next(names))


def base_ours(model: nn.Module) -> None:
    with lk.use(model, None):
        pass


def base_theirs(model: Any) -> None:
    with model.disable_adapter():
        pass


def other_ours(model: nn.Module) -> None:
    with lk.use(model, "a1"):
        pass


def other_theirs(model: Any) -> None:
    model.set_adapter("a1")
    model.set_adapter("a0")


if __name__ == "__main__":
    main()
