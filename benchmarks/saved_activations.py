"""How many bytes do the LoRAs of q, k and v keep of one input for the backward pass?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.harness import BASE, LORAKIT, PEFT, Aim, Benchmark, start
from benchmarks.subjects import both, linear_holder

WIDTH, RANK, TOKENS = 1024, 16, 256
NAMES = ("q", "k", "v")


def saved_bytes(run: Callable[[], object], parameters: Sequence[Tensor]) -> int:
    """Bytes of all different storages that autograd keeps during ``run``, parameters and what they share left out."""
    mine = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # or a freed address could be handed out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(kept.values())


def compare(bench: Benchmark, dtype: torch.dtype, dropout: float) -> None:
    model = linear_holder(WIDTH, NAMES, dtype).requires_grad_(False)
    ours, theirs = both(model, NAMES, training=True, r=RANK, lora_alpha=RANK, lora_dropout=dropout)
    torch.manual_seed(2)
    x = torch.randn(1, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    samples: dict[str, list[float]] = {LORAKIT: [], PEFT: [], BASE: []}
    holders: dict[str, nn.Module] = {LORAKIT: ours, PEFT: theirs.base_model.model, BASE: model}
    for _ in range(bench.rounds(3)):  # counted, not timed: every round must say the same
        for name, holder in holders.items():
            layers = [getattr(holder, n) for n in NAMES]
            count = saved_bytes(
                lambda layers=layers: [layer(x) for layer in layers], list(holder.parameters())
            )
            samples[name].append(count / (x.numel() * x.element_size()))
    word = str(dtype).removeprefix("torch.")
    bench.add(
        f"kept for q, k, v: {word}" + (f", dropout {dropout}" if dropout else ""),
        samples,
        unit="x",
        aim=Aim(LORAKIT, "<=", 1.1),
        note=f"In units of the bytes of the input, {TOKENS} x {WIDTH}; rank {RANK}; float32 adapter.",
    )


def main(argv: Sequence[str] | None = None) -> Benchmark:
    bench = start("saved_activations", __doc__ or "", argv)
    for dtype in (torch.float32, torch.bfloat16):
        for dropout in (0.0, 0.1):
            compare(bench, dtype, dropout)
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
