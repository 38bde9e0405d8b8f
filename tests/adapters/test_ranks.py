"""Ranks that hold a share of the change, and how they are written into a configuration."""

from __future__ import annotations

import math

import pytest
import torch

import lorakit as lk
from lorakit.adapters import Ranks, choose_ranks, resize
from lorakit.adapters.change import as_lora
from lorakit.core import AdapterSpec, Shape
from lorakit.errors import ConfigError
from tests.adapters.states import change, linear, random_state


def with_values(**values: list[float]) -> lk.AdapterState:
    """An adapter whose changes have these singular values."""
    methods, tensors = {}, {}
    for path, S in values.items():
        Q, P = (
            torch.linalg.qr(
                torch.randn(n, len(S), generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            ).Q
            for n in (20, 15)
        )
        methods[path], tensors[path] = as_lora(P.T, Q * torch.tensor(S), None, scale=2.0, dtype=torch.float64)
    return lk.AdapterState(AdapterSpec(methods, {path: linear(20, 15) for path in values}), tensors)


def test_the_least_rank_that_holds_the_share() -> None:
    state = with_values(a=[3, 1, 1, 1], b=[1, 1, 1, 1], c=[5, 0, 0, 0])
    found = choose_ranks(state, 0.9)
    assert found.targets == {"a": 3, "b": 4, "c": 1}  # 9 of 12, 10 of 12 and 11 of 12 = 0.917
    for path, k in found.targets.items():
        S = torch.linalg.svdvals(change(state, path)).square()
        assert S[:k].sum() >= 0.9 * S.sum()
        assert k == 1 or S[: k - 1].sum() < 0.9 * S.sum()
    assert (found.before, found.after) == (12 * 35, 8 * 35)


def test_equal_directions_are_all_needed() -> None:
    assert choose_ranks(with_values(a=[2] * 5), 1.0).targets == {"a": 5}
    assert choose_ranks(with_values(a=[2] * 5), 0.8).targets == {"a": 4}


def test_what_is_cut_to_these_ranks_has_lost_the_tail() -> None:
    state = with_values(a=[3, 1, 1, 1], b=[1, 1, 1, 1])
    made = resize(state, energy=0.9)
    for path, k in choose_ranks(state, 0.9).targets.items():
        S = torch.linalg.svdvals(change(state, path))[:4]
        assert made.state.tensors[path]["lora_A"].shape[-2] == k
        lost = change(state, path) - change(made.state, path)
        assert float(lost.norm()) == pytest.approx(math.sqrt(float(S[k:].square().sum())), abs=1e-12)


def test_bounds() -> None:
    state = with_values(a=[3, 1, 1, 1], b=[1, 1, 1, 1], c=[5, 0, 0, 0])
    assert choose_ranks(state, 0.9, least=2, most=3).targets == {"a": 3, "b": 3, "c": 2}


def test_as_a_configuration() -> None:
    ranks = {
        f"layers.{n}.{p}": 2 if p == "q_proj" else 4 for n in range(3) for p in ("q_proj", "v_proj", "o_proj")
    }
    found = Ranks(0.9, ranks, 0, 0)
    assert (found.r, found.rank_pattern) == (4, {"q_proj": 2})
    lora = lk.LoRA(r=found.r, rank_pattern=found.rank_pattern)
    assert {path: lora.for_path(path).r for path in ranks} == ranks


def test_other_targets_are_left_out_of_account() -> None:
    shapes = {"q": linear(), "head": Shape("parameter", out=3, in_=4, stored=(3, 4))}
    state = random_state({"q": lk.LoRA(r=3), "head": lk.FullFineTuning()}, shapes)
    assert set(choose_ranks(state).targets) == {"q"}
    with pytest.raises(ConfigError, match="No target of this adapter has a rank"):
        choose_ranks(random_state({"q": lk.LoHa(r=3)}, {"q": linear()}))


def test_a_stack_has_one_rank() -> None:
    shape = Shape("parameter", batch=(3,), out=8, in_=9, stored=(3, 8, 9))
    state = random_state({"q": lk.LoRA(r=4)}, {"q": shape})
    found = choose_ranks(state, 0.5)
    assert found.before == 3 * 4 * 17
    S = torch.linalg.svdvals(change(state)).square().sum(0)
    k = found.targets["q"]
    assert S[:k].sum() >= 0.5 * S.sum() > S[: k - 1].sum()


def test_mistakes() -> None:
    state = with_values(a=[1, 1])
    for energy in (0, 1.1, -1):
        with pytest.raises(ConfigError, match="share of the squared norm"):
            choose_ranks(state, energy)
    for least, most in ((0, None), (3, 2)):
        with pytest.raises(ConfigError, match="from least to most"):
            choose_ranks(state, least=least, most=most)
