"""Read an adapter with no model in memory, look at it, change its numbers, and put it on a model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import lorakit as lk


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"encoder": nn.Linear(8, 8), "head": nn.Linear(8, 2)})


def main() -> None:
    model = new_model()
    lk.attach(model, {"encoder": lk.LoRA(r=2, alpha=4), "head": lk.FullFineTuning()}, name="task", seed=1)
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.add_(torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        lk.save(model, Path(folder) / "task", name="task")
        state = lk.read(Path(folder) / "task")  # pure data: a spec and tensors
    for path, method in state.spec.methods.items():
        sizes = {name: tuple(tensor.shape) for name, tensor in state.tensors[path].items()}
        print(f"{path}: {method} {sizes}")
    print(f"{state.numel} numbers, {state.nbytes} bytes")

    other = new_model()
    lk.attach(other, state, name="task")
    x = torch.randn(3, 8)
    assert torch.equal(other["encoder"](x), model["encoder"](x))
    assert torch.equal(other["head"](x), model["head"](x))
    print("The same outputs on a fresh copy of the base.")


if __name__ == "__main__":
    main()
