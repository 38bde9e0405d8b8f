"""What does one adapter add to a forward pass of one layer, at 1 and at 256 tokens, for width 1024 and rank 16?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.harness import BASE, LORAKIT, PEFT, Aim, Benchmark, over_base, start
from benchmarks.subjects import both, check_changes, check_equal, linear_holder

WIDTH, RANK = 1024, 16
THIRD = Aim("ratio", "<=", 1 / 3)


def plain(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """A forward pass that records nothing."""

    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def recorded(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """A forward pass that records what a backward pass would need."""
    return lambda: layer(x)


def step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward, as in the middle of a network: the input requires a gradient too."""
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    direction = torch.ones(*x.shape[:-1], WIDTH, dtype=x.dtype)

    def run() -> None:
        torch.autograd.grad(layer(x), wanted, direction)

    return run


def compare(bench: Benchmark, tokens: int, dtype: torch.dtype, rounds: int) -> None:
    model = linear_holder(WIDTH, dtype=dtype).requires_grad_(False)
    ours, theirs = both(model, ["q"], training=True, r=RANK, lora_alpha=RANK)
    layers = {BASE: model.q, LORAKIT: ours.q, PEFT: theirs.base_model.model.q}
    # One weight for all three: where in memory a copy of its own lies makes some hundredths of a difference in the
    # layer's time, which is as much as is to be measured.
    ours.q.weight.data = layers[PEFT].base_layer.weight.data = model.q.weight.data
    torch.manual_seed(2)
    x = torch.randn(1, tokens, WIDTH, dtype=dtype)
    with torch.no_grad():
        outputs = {name: layer(x) for name, layer in layers.items()}
    word = str(dtype).removeprefix("torch.")
    what = f"T={tokens}, {word}" + (" (adapter float32)" if dtype != torch.float32 else "")
    check_equal(outputs[LORAKIT], outputs[PEFT], what, 1e-4 if dtype == torch.float32 else 3e-2)
    check_changes(outputs[LORAKIT], outputs[BASE], what)
    trained = x.clone().requires_grad_(True)
    for mode, make, given, aim in (
        ("forward, no_grad", plain, x, THIRD),
        ("forward, grad", recorded, trained, THIRD),
        ("forward and backward", step, trained, None),
    ):
        samples = bench.measure(
            {name: make(layer, given) for name, layer in layers.items()}, rounds=rounds, at_least=0.02
        )
        bench.add(f"{mode}: added at {what}", over_base(samples), ratio=(LORAKIT, PEFT), aim=aim)
        bench.add(f"{mode}: in all at {what}", samples, drawn=False)


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("forward", __doc__ or "", argv)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, rounds in ((1, 200), (256, 150)):
            compare(bench, tokens, dtype, rounds)
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
