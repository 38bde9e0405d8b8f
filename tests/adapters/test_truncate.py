"""Cutting a DyLoRA to a rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters import truncate
from lorakit.errors import ConfigError
from tests.contracts.pairs import Case, close, pairs, randomise


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.q(x)))


def at_rank(case: Case, b: int) -> Tensor:
    """What the trained model computes in a step of rank ``b``."""
    active = case.parameters("a")["dylora_active"]
    with torch.no_grad():
        active.copy_((torch.arange(len(active)) < b).to(active))
    return case.model(case.x)


@pytest.mark.parametrize("b", [1, 2])
@pairs(settings=("dylora",))
def test_the_truncated_adapter_computes_what_the_rank_does(setting: str, kind: str, b: int) -> None:
    case = Case(kind)
    case.attach(setting)
    with torch.no_grad():
        case.parameters("a")["dylora_active"].fill_(1)
    state = truncate(lk.extract(case.model, "a"), b)
    assert set(state.spec.methods.values()) == {lk.LoRA(r=b, alpha=3)}
    assert not state.shared
    lk.attach(case.stock, state, name="a")
    close(case.stock(case.x), at_rank(case, b), max(1e-12, case.kind.precision))


def test_inside_dora_and_beside_a_head() -> None:
    torch.manual_seed(0)
    model = Net().double()
    stock = Net().double()
    stock.load_state_dict(model.state_dict())
    methods = {"q": lk.DoRA(lk.DyLoRA(r=3, alpha=2, dropout=0.1)), "head": lk.FullFineTuning()}
    lk.attach(model, methods, name="a", seed=0)
    randomise(lk.trainable(model).values(), torch.Generator().manual_seed(0))
    model.eval()
    state = truncate(lk.extract(model, "a"), 2)
    assert state.spec.methods["q"] == lk.DoRA(lk.LoRA(r=2, alpha=2, dropout=0.1))
    with torch.no_grad():
        model.q.lorakit.output.a.dylora_active.copy_(torch.tensor([1.0, 1.0, 0.0]))
    x = torch.randn(4, 6, dtype=torch.float64)
    lk.attach(stock, state, name="a")
    close(stock.eval()(x), model(x), 1e-13)


def test_it_is_saved_in_pefts_form(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 6)
    lk.attach(model, lk.DyLoRA(r=4, alpha=8), ["q"], seed=0)
    randomise(lk.trainable(model).values(), torch.Generator().manual_seed(0))
    cut = truncate(lk.extract(model), 2)
    lk.detach(model)
    lk.attach(model, cut)
    lk.save(model, tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 8)
    y = model(x)
    lk.detach(model)
    lk.load(model, tmp_path / "cut")
    close(model(x), y, 1e-6)


def test_the_state_is_left_as_it_was() -> None:
    model = Net()
    lk.attach(model, lk.DyLoRA(r=4), ["q"])
    state = lk.extract(model)
    cut = truncate(state, 1)
    cut.tensors["q"]["lora_A"].fill_(7)
    assert not (state.tensors["q"]["lora_A"] == 7).any()
    assert state.spec.methods["q"] == lk.DyLoRA(r=4)


def test_what_cannot_be_cut_is_refused() -> None:
    model = Net()
    lk.attach(model, lk.LoRA(r=2), ["q"], name="plain")
    with pytest.raises(ConfigError, match=r"trained as DyLoRA.*this one uses lora"):
        truncate(lk.extract(model, "plain"), 1)
    lk.attach(model, lk.DyLoRA(r=4), ["q"], name="a")
    for r in (0, 5, True, 1.0):
        with pytest.raises(ConfigError, match="for the ranks 1 to 4; it cannot be cut to"):
            truncate(lk.extract(model, "a"), r)  # type: ignore[arg-type]
