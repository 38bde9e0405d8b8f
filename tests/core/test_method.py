"""What each tier of method derives from less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit as lk
from lorakit.core import DeltaMethod, Factors, LowRankMethod, Target, WeightMethod
from lorakit.methods.dora import DoRA
from lorakit.targets import find
from tests.contracts.kinds import KINDS
from tests.contracts.pairs import close


@dataclass(frozen=True)
class Scaled(WeightMethod):
    """A weight formula and nothing else: each row times a number."""

    def shapes(self, shape: Any) -> dict[str, tuple[int, ...]]:
        return {"k": (*shape.batch, shape.out)}

    def start(self, target: Target, generator: Any, shared: Any) -> dict[str, Tensor]:
        return {"k": torch.ones(self.shapes(target.shape)["k"])}

    def weight(self, target: Target, p: Any, W: Tensor) -> Tensor:
        return p["k"].unsqueeze(-1).to(W.dtype) * W


@dataclass(frozen=True)
class Added(DeltaMethod):
    """A delta and nothing else."""

    def shapes(self, shape: Any) -> dict[str, tuple[int, ...]]:
        return {"d": (*shape.batch, shape.out, shape.in_)}

    def start(self, target: Target, generator: Any, shared: Any) -> dict[str, Tensor]:
        return {"d": torch.zeros(self.shapes(target.shape)["d"])}

    def delta(self, target: Target, p: Any) -> Tensor:
        return p["d"]


@dataclass(frozen=True)
class Pair(LowRankMethod):
    """Two factors and nothing else."""

    def shapes(self, shape: Any) -> dict[str, tuple[int, ...]]:
        return {"a": (*shape.batch, 2, shape.in_), "b": (*shape.batch, shape.out, 2)}

    def start(self, target: Target, generator: Any, shared: Any) -> dict[str, Tensor]:
        return {name: torch.zeros(size) for name, size in self.shapes(target.shape).items()}

    def factors(self, target: Any, p: Any) -> Factors:
        return Factors(p["a"], p["b"], 0.5)


TIERS = {
    "weight": Scaled(),
    "delta": Added(),
    "lowrank": Pair(),
    "dora_over_delta": DoRA(Added()),
    "dora_over_pair": DoRA(Pair()),
}
HOOKED = [
    name
    for name, kind in KINDS.items()
    if kind.names == "layer" and kind.adapts == "layer" and not kind.lossy and name != "linear-overridden"
]


@pytest.mark.parametrize("kind", HOOKED)
@pytest.mark.parametrize("tier", TIERS)
def test_a_formula_is_enough_to_run_mix_and_merge(tier: str, kind: str) -> None:
    torch.manual_seed(0)
    model, x = KINDS[kind].build().double().requires_grad_(False), KINDS[kind].inputs()
    (target,) = find(model, ["layer"])
    base = model(x)
    W = target.weight().clone()
    lk.attach(model, TIERS[tier], ["layer"], name="a", dtype=torch.float64)
    p = {n.rsplit(".", 1)[-1]: t for n, t in model.named_parameters() if ".lorakit." in n}
    close(model(x), base, 1e-12)
    with torch.no_grad():
        for t in p.values():
            t.add_(torch.randn_like(t) * 0.3)
    method = TIERS[tier]
    assert isinstance(method, WeightMethod)
    expected = target.add_bias(target.apply(x, method.weight(target, p, W)))
    close(model(x), expected, 1e-12)
    with lk.use(model, {"a": 0.4}):
        close(model(x), base + 0.4 * (expected - base), 1e-12)
    lk.merge(model)
    close(model(x), expected, 1e-12)
    lk.unmerge(model)
    assert torch.equal(target.weight(), W)


@pytest.mark.parametrize("method", [Scaled(), Added(), Pair()], ids=["weight", "delta", "lowrank"])
def test_folding_adds_the_weighted_change_to_a_running_sum(method: WeightMethod) -> None:
    (target,) = find(KINDS["experts"].build().double(), ["layer.up"])
    p = {name: torch.randn(size, dtype=torch.float64) for name, size in method.shapes(target.shape).items()}
    base = target.weight()
    running = torch.randn_like(base)
    before = running.clone()
    got = method.fold(target, p, running, base, 0.3)
    close(got, before + 0.3 * (method.weight(target, p, base) - base), 1e-13)
    assert torch.equal(running, before), "the running sum is not the method's to change"
    assert torch.equal(base, target.weight())
