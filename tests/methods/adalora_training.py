"""Two small layers, and the training loop that AdaLoRA is tested with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.methods.adalora_allocator import RankAllocator


class Loss(nn.Module):
    """Two layers and a loss, in the form in which PEFT adds its penalty to it."""

    class Output:
        """A model's output with its loss, as transformers has it."""

        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 10), nn.Linear(10, 7)

    def forward(self, x: Tensor, y: Tensor) -> Loss.Output:
        return self.Output((self.b(torch.tanh(self.a(x))) - y).square().mean())


def model_and_batches(steps: int) -> tuple[Loss, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = Loss().double()
    return model, [(torch.randn(5, 8).double(), torch.randn(5, 7).double()) for _ in range(steps)]


def attached(model: nn.Module, method: lk.AdaLoRA | lk.DoRA, total_steps: int) -> RankAllocator:
    lk.attach(model, method, ["a", "b"], seed=0)
    (process,) = lk.training_processes(model, total_steps=total_steps)
    assert isinstance(process, RankAllocator)
    return process


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    return {path: getattr(model, path).lorakit.output.default.lora_E for path in "ab"}


def nonzero(model: nn.Module) -> int:
    return sum(int(E.count_nonzero()) for E in singular_values(model).values())


def train(
    model: nn.Module,
    process: RankAllocator,
    batches: list[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer | None = None,
    first: int = 0,
) -> list[int]:
    """The loop of `TrainingProcess`; returns how many singular values are not zero after each step."""
    optimizer = optimizer or torch.optim.AdamW(lk.trainable(model).values(), lr=1e-2)
    counts = []
    for step, (x, y) in enumerate(batches, first):
        process.before_forward(step)
        loss = model(x, y).loss + process.penalty()
        loss.backward()
        process.before_step(step)
        optimizer.step()
        process.after_step(step)
        optimizer.zero_grad()
        counts.append(nonzero(model))
    return counts
