"""PEFT's forms beside PEFT itself, from the same seed; LoraHub by its definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.adapters import combine
from lorakit.errors import ConfigError
from tests.adapters.states import change, linear, loras, random_state

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.q, self.k = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.c = nn.Conv2d(2, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.k(self.q(self.e(x)))


def both(
    monkeypatch: pytest.MonkeyPatch, how: str, tmp_path: Any, **settings: Any
) -> tuple[lk.AdapterState, Any]:
    """Two adapters that PEFT wrote, combined by both libraries; PEFT's result read back."""
    torch.manual_seed(0)
    config = {"init_lora_weights": False, "target_modules": ["e", "q", "k", "c"], "r": 3}
    model = peft.get_peft_model(Net(), peft.LoraConfig(lora_alpha=6, **config), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(lora_alpha=2, **config))
    model.save_pretrained(tmp_path)
    states = [lk.read(tmp_path, name=name) for name in ("a", "b")]
    from peft.tuners.lora import model as lora_model

    freeze = lora_model._freeze_adapter

    def then_seed(*args: Any) -> None:
        freeze(*args)
        torch.manual_seed(7)  # after the fresh adapter has drawn its start

    monkeypatch.setattr(lora_model, "_freeze_adapter", then_seed)
    theirs = copy.deepcopy(settings)
    if "r" in theirs:
        theirs["svd_rank"] = theirs.pop("r")
    model.add_weighted_adapter(
        ["a", "b"], [0.7, -0.4], "made", combination_type=how.removeprefix("peft_"), **theirs
    )
    model.save_pretrained(tmp_path, selected_adapters=["made"])
    order = [n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")]
    arranged = [
        lk.AdapterState(
            type(s.spec)({p: s.spec.methods[p] for p in order}, {p: s.spec.shapes[p] for p in order}),
            {p: s.tensors[p] for p in order},
        )
        for s in states
    ]
    return combine(arranged, [0.7, -0.4], how, seed=7, **settings).state, lk.read(tmp_path, name="made")


APART = ["peft_linear", "peft_ties", "peft_dare_linear", "peft_dare_ties", "peft_magnitude_prune"]
CUT = ["peft_svd", "peft_ties_svd", "peft_dare_linear_svd", "peft_dare_ties_svd", "peft_magnitude_prune_svd"]


def density(how: str) -> dict[str, float]:
    return {} if how in ("peft_linear", "peft_svd") else {"density": 0.6}


@pytest.mark.parametrize("how", APART)
def test_factors_equal_pefts(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    ours, theirs = both(monkeypatch, how, tmp_path, **density(how))
    assert set(ours.tensors) == set(theirs.tensors)
    for path, group in theirs.tensors.items():
        for name, tensor in group.items():
            torch.testing.assert_close(ours.tensors[path][name], tensor, rtol=1e-6, atol=1e-7)
        assert ours.spec.methods[path].scale == theirs.spec.methods[path].scale == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("r", [None, 2])
@pytest.mark.parametrize("how", CUT)
def test_changes_equal_pefts(how: str, r: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    ours, theirs = both(monkeypatch, how, tmp_path, **density(how), **({"r": r} if r else {}))
    for path in theirs.tensors:
        torch.testing.assert_close(change(ours, path), change(theirs, path), rtol=1e-4, atol=1e-5)


def test_linear_has_cross_terms_that_the_sum_has_not() -> None:
    shape = {"q": linear()}
    a, b = (random_state({"q": lk.LoRA(r=2, alpha=2)}, shape, seed=n) for n in (1, 2))
    A = a.tensors["q"]["lora_A"] + b.tensors["q"]["lora_A"]
    B = a.tensors["q"]["lora_B"] + b.tensors["q"]["lora_B"]
    torch.testing.assert_close(change(combine([a, b], how="peft_linear").state), B @ A)
    assert (change(combine([a, b]).state) - B @ A).norm() > 0.3 * (B @ A).norm()


def test_lorahub_is_quadratic_and_one_hot_gives_the_module() -> None:
    shape = {"q": linear()}
    states = [random_state({"q": lk.LoRA(r=2, alpha=6)}, shape, seed=n) for n in range(3)]
    weights = [0.5, -1.0, 0.25]
    A = sum(w * s.tensors["q"]["lora_A"] for w, s in zip(weights, states, strict=True))
    B = sum(w * s.tensors["q"]["lora_B"] for w, s in zip(weights, states, strict=True))
    torch.testing.assert_close(change(combine(states, weights, "lorahub").state), 3.0 * B @ A)  # type: ignore[operator]
    torch.testing.assert_close(change(combine(states, [0, 1, 0], "lorahub").state), change(states[1]))
    twice = change(combine(states, [2 * w for w in weights], "lorahub").state)
    torch.testing.assert_close(twice, 4 * change(combine(states, weights, "lorahub").state))


def test_what_peft_has_no_rule_for_is_refused() -> None:
    vera = random_state({"q": lk.VeRA(r=3, max_in=7, max_out=9)}, {"q": linear()})
    with pytest.raises(ConfigError, match=r"defined for plain LoRA.*'q' has VeRA"):
        combine([vera], how="peft_svd", r=2)
    with pytest.raises(ConfigError, match=r"all ranks must be equal; 'q' has \[2, 3, 4\]"):
        combine(loras(), how="lorahub")
