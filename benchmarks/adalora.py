"""What does one training step of AdaLoRA cost on 12 linear layers of width 768, ranks moving, beside PEFT's?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import LORAKIT, PEFT, Benchmark, start
from benchmarks.subjects import check_changes, check_equal, folder

WIDTH, LAYERS, RANK, TARGET, TOKENS, STEPS = 768, 12, 12, 8, 32, 1000
MIDDLE = STEPS // 2  # a step in which triplets are masked


class Stack(nn.Module):
    """Linear layers, each added to its input, with a loss as transformers models have: PEFT adds its penalty there."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> SimpleNamespace:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return SimpleNamespace(loss=x.square().mean(), output=x)


def ours_and_theirs(stock: Stack) -> tuple[nn.Module, Any]:
    """One adapter on both sides, written by PEFT."""
    from peft import AdaLoraConfig, get_peft_model

    import lorakit as lk

    config = AdaLoraConfig(
        init_r=RANK, target_r=TARGET, total_step=STEPS, tinit=10, tfinal=10, deltaT=1,
        target_modules=[str(n) for n in range(LAYERS)],
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = get_peft_model(copy.deepcopy(stock), config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_E" in name:
                p.normal_(std=0.1)
    ours = copy.deepcopy(stock)
    with folder() as directory:
        theirs.save_pretrained(directory)
        lk.load(ours, directory, trainable=True)
    return ours.train(), theirs.train()


def our_step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    import lorakit as lk

    (process,) = lk.training_processes(model, total_steps=STEPS)
    optimizer = torch.optim.AdamW(lk.trainable(model).values(), lr=1e-4)

    def run() -> None:
        (model(x).loss + process.penalty()).backward()
        process.before_step(MIDDLE)
        optimizer.step()
        process.after_step(MIDDLE)
        optimizer.zero_grad()

    return run


def their_step(model: Any, x: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        model(x).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(MIDDLE)
        optimizer.zero_grad()

    return run


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("adalora", __doc__ or "", argv)
    torch.manual_seed(0)
    stock = Stack().requires_grad_(False)
    ours, theirs = ours_and_theirs(stock)
    x = torch.randn(1, TOKENS, WIDTH)
    with torch.no_grad():
        check_equal(ours(x).output, theirs(x).output, "AdaLoRA")
        check_changes(ours(x).output, stock(x).output, "AdaLoRA")
    steps = {LORAKIT: our_step(ours, x), PEFT: their_step(theirs, x)}
    for step in steps.values():
        for _ in range(3):
            step()
    with torch.no_grad():
        check_equal(ours(x).output, theirs(x).output, "AdaLoRA after three steps", 1e-3)
    bench.add(f"AdaLoRA step, {LAYERS} layers, T={TOKENS}", bench.measure(steps, rounds=30, at_least=0.02))
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
