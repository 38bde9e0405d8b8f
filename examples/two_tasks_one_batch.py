"""Two adapters over one base, in one batch: each row takes its own; threads do not disturb each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import lorakit as lk


def randomise(model: nn.Module) -> None:
    """Stand in for training: give the factors values."""
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.normal_(std=0.1)


def main() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, batch_first=True)
    model = nn.TransformerEncoder(encoder, num_layers=2, enable_nested_tensor=False).eval()
    lk.attach(model, lk.LoRA(r=4), targets="all-linear", name="summary")
    lk.attach(model, lk.DoRA(lk.LoRA(r=2)), targets=["linear1", "linear2"], name="sentiment")
    randomise(model)
    x = torch.randn(4, 10, 32)

    with torch.no_grad():
        with lk.use(model, rows=["summary", "sentiment", None, "summary"]):
            mixed = model(x)

        def alone(name: str | None) -> torch.Tensor:
            with torch.no_grad(), lk.use(model, name):  # this thread only
                return model(x)

        with ThreadPoolExecutor(2) as pool:
            summary, sentiment = pool.map(alone, ["summary", "sentiment"])
        base = alone(None)

    for row, reference in enumerate([summary, sentiment, base, summary]):
        difference = (mixed[row] - reference[row]).abs().max().item()
        print(f"row {row}: differs from its own run by {difference:.1e}")
        assert difference < 1e-5


if __name__ == "__main__":
    main()
