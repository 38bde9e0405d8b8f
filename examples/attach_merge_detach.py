"""Adapt a model, train it a little, merge, unmerge and detach: the life of an adapter on any PyTorch module."""

from __future__ import annotations

import torch
from torch import nn

import lorakit as lk


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    x, noise = torch.randn(256, 16), torch.randn(256, 1)
    y = x[:, :1] * x[:, 1:2] + 0.1 * noise
    before = model(x)

    print(lk.attach(model, lk.LoRA(r=4, alpha=8), targets=["0", "2"], name="product"))
    assert torch.equal(model(x), before)  # a new adapter changes nothing, bit for bit

    optimizer = torch.optim.AdamW(lk.trainable(model).values(), lr=1e-2)
    for step in range(200):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    adapted = model(x)
    with lk.use(model, None):
        assert torch.equal(model(x), before)  # the base is still there
    lk.merge(model, "product")
    print(f"largest difference merged/unmerged: {(model(x) - adapted).abs().max().item():.1e}")
    lk.unmerge(model)
    lk.detach(model)
    assert torch.equal(model(x), before)
    print("Detached: the model is what it was.")


if __name__ == "__main__":
    main()
