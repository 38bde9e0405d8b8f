"""Full fine-tuning: the copy is the adapter's own."""

from __future__ import annotations

import torch
from torch import nn

import lorakit as lk
from tests.contracts.kinds import Host


def test_the_copy_is_trained_and_the_base_is_not() -> None:
    torch.manual_seed(0)
    model = Host(nn.Linear(4, 3))
    base = {k: v.clone() for k, v in model.state_dict().items()}
    report = lk.attach(model, lk.FullFineTuning(), ["layer"], name="task")
    assert {site.path for site in report.sites} == {"layer.weight", "layer.bias"}
    assert report.trainable == 4 * 3 + 3
    optimizer = torch.optim.SGD(lk.trainable(model).values(), lr=0.1)
    x = torch.randn(5, 4)
    before = model(x).detach()
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(x), before)
    with lk.use(model, None):
        assert torch.equal(model(x), before)
    lk.detach(model)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())


def test_two_tasks_have_a_head_each() -> None:
    torch.manual_seed(0)
    model = Host(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    for task in ("a", "b"):
        lk.attach(model, lk.FullFineTuning(), ["layer"], name=task)
    heads = {n: p for n, p in model.named_parameters() if "lorakit" in n}
    with torch.no_grad():
        for name, p in heads.items():
            p.fill_(1.0 if ".a." in name else 2.0)
    with lk.use(model, rows=["a", "b"]):
        y = model(x)
    torch.testing.assert_close(
        y, torch.stack([x[0].sum() + 1, 2 * x[1].sum() + 2]).unsqueeze(-1).expand(2, 3)
    )


def test_by_default_every_parameter_is_taken() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    report = lk.attach(model, lk.FullFineTuning())
    assert report.parameters == report.base_parameters
    x = torch.randn(2, 3)
    full = model(x)
    with lk.use(model, None):
        assert torch.equal(model(x), full)


def test_a_scalar_can_be_trained() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gate

    model = Gate()
    lk.attach(model, lk.FullFineTuning(), ["gate"])
    (own,) = lk.trainable(model).values()
    with torch.no_grad():
        own.fill_(3.0)
    assert model(torch.tensor(2.0)) == 6
    lk.merge(model)
    assert model._parameters["gate"] == 3
    assert model._parameters["gate"].shape == ()
