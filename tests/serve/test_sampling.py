"""Tokens are drawn with the probabilities that the settings mean, and the settings that make no sense are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorakit.errors import ConfigError, InternalServeError
from lorakit.serve.sampling import Chooser, Sampling, choose, sample


def formula(logits: list[float], s: Sampling) -> list[float]:
    """The probabilities in plain arithmetic: temperature, then top-k, top-p, min-p, each on what is left."""
    p = [math.exp((x - max(logits)) / s.temperature) for x in logits]
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = order[: s.top_k] if s.top_k else order
    mass = sum(p[i] for i in kept)
    nucleus, reached = [], 0.0
    for i in kept:
        if reached >= s.top_p * mass:
            break
        nucleus.append(i)
        reached += p[i]
    final = [i for i in nucleus if p[i] >= s.min_p * p[order[0]]]
    total = sum(p[i] for i in final)
    return [p[i] / total if i in final else 0.0 for i in range(len(p))]


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 4},
    {"top_p": 0.6},
    {"top_k": 5, "top_p": 0.8},
    {"min_p": 0.2},
    {"top_k": 6, "top_p": 0.9, "min_p": 0.15, "temperature": 1.3},
]


class Sweep(Chooser):
    """Draws every number of a fine grid in turn, so that shares are exact and not a matter of luck."""

    def __init__(self, sampling: Sampling, count: int) -> None:
        super().__init__(sampling, [])
        self._at, self._count = 0, count

    def draw(self) -> float:
        self._at += 1
        return (self._at - 0.5) / self._count


@pytest.mark.parametrize("wanted", SETTINGS)
@pytest.mark.parametrize("size", [12, 700])
def test_shares_are_the_formula_s(wanted: dict[str, Any], size: int) -> None:
    logits = (
        torch.randn(size, generator=torch.Generator().manual_seed(1)) * (2 if size < 100 else 0.3)
    ).tolist()
    sampling = Sampling(**wanted)
    right = torch.tensor(formula(logits, sampling))
    count = 20_000
    chooser = Sweep(sampling, count)
    drawn = torch.zeros(size)
    row = torch.tensor(logits)
    for _ in range(count // 500):
        for token in sample(row.expand(500, -1), [chooser] * 500):
            drawn[token] += 1
    assert (drawn / count - right).abs().max() <= 2 / count + 1e-6
    assert not drawn[right == 0].any()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.sampled_from([*range(len(SETTINGS)), None]), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_a_row_does_not_see_its_neighbours(rows: list[int | None], seed: int) -> None:
    logits = torch.randn(len(rows), 400, generator=torch.Generator().manual_seed(seed)) * 2

    def chooser(i: int, which: int | None) -> Chooser:
        given = {"temperature": 0.0} if which is None else SETTINGS[which]
        return Chooser(Sampling(seed=i, **given), [])

    together = choose(logits, [chooser(i, which) for i, which in enumerate(rows)])
    alone = [choose(logits[i : i + 1], [chooser(i, which)])[0] for i, which in enumerate(rows)]
    assert together == alone


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    row = torch.tensor([[0.0, 3.0, 1.0, 3.0]])
    assert choose(row, [Chooser(Sampling(temperature=0), [])])[0].token_id == 1


def test_a_seed_repeats_its_choices_and_each_answer_has_its_own() -> None:
    logits = torch.zeros(1, 1000)

    def drawn(seed: int | None, index: int = 0) -> list[int]:
        chooser = Chooser(Sampling(seed=seed), [], index=index)
        return [choose(logits, [chooser])[0].token_id for _ in range(8)]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert drawn(3) != drawn(3, index=1)
    assert drawn(None) != drawn(None)


def adjusted(logits: Tensor, sampling: Sampling, prompt: list[int], answer: list[int]) -> list[float]:
    chooser = Chooser(sampling, prompt)
    for token in answer:
        chooser.accept(token)
    return chooser.adjusted(logits).tolist()


def test_penalties_by_hand() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0])
    once = {"repetition_penalty": 2.0}
    assert adjusted(logits, Sampling(**once), [0], [1]) == [1.0, -2.0, 0.5, 1.0]
    assert adjusted(logits, Sampling(presence_penalty=0.5), [0], [1, 1]) == [2.0, -1.5, 0.5, 1.0]
    assert adjusted(logits, Sampling(frequency_penalty=0.5), [0], [1, 1, 3]) == [2.0, -2.0, 0.5, 0.5]
    assert adjusted(logits, Sampling(logit_bias={2: 10.0}), [], []) == [2.0, -1.0, 10.5, 1.0]
    assert logits.tolist() == [2.0, -1.0, 0.5, 1.0]


def test_repetition_penalty_is_transformers_own() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, before, after = torch.randn(1, 50), [3, 7, 7, 9], [11, 3]
    want = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*before, *after]]), logits.clone())[0]
    found = torch.tensor(adjusted(logits[0], Sampling(repetition_penalty=1.7), before, after))
    assert torch.allclose(found, want)


def test_only_allowed_tokens_are_chosen() -> None:
    logits, mask = torch.randn(1, 30), torch.zeros(30, dtype=torch.bool)
    mask[[4, 5]] = True
    for temperature in (0.0, 3.0):
        chooser = Chooser(Sampling(temperature=temperature), [])
        assert {choose(logits, [chooser], [mask])[0].token_id for _ in range(40)} <= {4, 5}


@pytest.mark.parametrize("broken", [float("nan"), float("-inf")])
def test_a_row_without_a_finite_logit_is_an_error(broken: float) -> None:
    with pytest.raises(InternalServeError, match="no finite logit"):
        choose(torch.full((1, 5), broken), [Chooser(Sampling(), [])])


def test_logprobs_are_the_model_s_own() -> None:
    logits = torch.randn(2, 40)
    sampling = Sampling(temperature=0, logit_bias={7: 50.0})
    with_logs = [Chooser(sampling, [], logprobs=3), Chooser(Sampling(temperature=0), [])]
    first, second = choose(logits, with_logs)
    logs = logits[0].log_softmax(-1)
    assert first.token_id == 7
    assert first.logprob == pytest.approx(float(logs[7]), abs=1e-5)
    assert first.top is not None
    assert [token for token, _ in first.top] == logs.topk(3).indices.tolist()
    assert [p for _, p in first.top] == pytest.approx(logs.topk(3).values.tolist(), abs=1e-5)
    assert second.logprob is None
    assert second.top is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", "1"),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: 200.0}),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        Sampling(**{name: value})
