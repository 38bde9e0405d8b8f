"""How long does it take to attach a LoRA to 168 layers?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

import lorakit as lk
from benchmarks.harness import LORAKIT, PEFT, Benchmark, Side, start
from benchmarks.subjects import LINEARS, SITES, plain_llama, transformers_llama


class Fresh:
    """A side that wraps a model: each run gets a copy of its own, made before the clock starts."""

    def __init__(self, model: nn.Module, wrap: Callable[[Any], Any]) -> None:
        self.model, self.wrap = model, wrap
        self.copy: Any = None
        self.wrapped: Any = None

    def side(self) -> Side:
        """For `Benchmark.measure`."""
        return Side(self.run, before=self.before, after=self.after)

    def before(self) -> None:
        self.copy = copy.deepcopy(self.model)

    def run(self) -> None:
        self.wrapped = self.wrap(self.copy)

    def after(self) -> None:
        self.copy = self.wrapped = None


def with_lorakit(model: nn.Module) -> lk.AttachReport:
    return lk.attach(model, lk.LoRA(r=8, alpha=16), targets=LINEARS)


def with_peft(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS))


def check(model: nn.Module) -> None:
    """Both sides adapt all 168 layers."""
    ours = len(with_lorakit(copy.deepcopy(model)).sites)
    theirs = sum(hasattr(m, "lora_A") for m in with_peft(copy.deepcopy(model)).modules())
    if ours != SITES or theirs != SITES:
        raise SystemExit(f"Expected {SITES} sites; lorakit has {ours}, PEFT {theirs}.")


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("attach", __doc__ or "", argv)
    for what, model in (("plain torch model", plain_llama()), ("transformers Llama", transformers_llama())):
        check(model)
        sides = {LORAKIT: Fresh(model, with_lorakit).side(), PEFT: Fresh(model, with_peft).side()}
        bench.add(f"attach to {SITES} layers, {what}", bench.measure(sides, rounds=15))
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
