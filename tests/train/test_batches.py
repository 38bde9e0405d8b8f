"""The plan of a run's batches."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.train.batches import PlannedBatches, plan_batches

LENGTHS = [3, 9, 4, 7, 5, 8, 2, 6, 10, 1]


def plan(lengths: list[int] = LENGTHS, **changes: Any) -> list[list[int]]:
    settings: dict[str, Any] = {"rows": 3, "tokens": None, "epochs": 1, "seed": 0, "padded": False, **changes}
    return plan_batches(lengths, **settings)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    rows=st.one_of(st.none(), st.integers(1, 9)),
    tokens=st.one_of(st.none(), st.integers(1, 90)),
    seed=st.integers(0, 5),
    padded=st.booleans(),
)
def test_each_row_comes_once_an_epoch_within_the_limits(
    lengths: list[int], rows: int | None, tokens: int | None, seed: int, padded: bool
) -> None:
    batches = plan(lengths, rows=rows, tokens=tokens, seed=seed, padded=padded)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert rows is None or len(batch) <= rows
        cost = max(lengths[r] for r in batch) * len(batch) if padded else sum(lengths[r] for r in batch)
        assert tokens is None or cost <= tokens or len(batch) == 1


def test_same_seed_same_plan_and_other_seeds_and_epochs_differ() -> None:
    assert plan(seed=1) == plan(seed=1)
    assert plan(seed=1) != plan(seed=2)
    two = plan(epochs=2)
    assert len(two) == 8
    assert two[:4] != two[4:]
    assert two[:4] == plan()


def test_part_of_an_epoch_and_a_limit() -> None:
    assert sum(map(len, plan(epochs=1.5))) == 15
    assert sum(map(len, plan(epochs=0.01))) == 1
    assert plan(epochs=100, most=5) == plan(epochs=2)[:5]


def test_padding_puts_rows_of_like_length_together() -> None:
    lengths = [1, 50] * 30
    batches = plan(lengths, padded=True, rows=10)
    assert all(len({lengths[r] for r in batch}) == 1 for batch in batches)
    assert [lengths[b[0]] for b in batches] != sorted(lengths[b[0]] for b in batches)


def test_as_a_batch_sampler() -> None:
    sampler = PlannedBatches(plan())
    assert len(sampler) == 4
    assert list(sampler) == plan()
    assert list(sampler) == plan()


@pytest.mark.parametrize("padded", [False, True])
def test_one_row(padded: bool) -> None:
    assert plan([5], padded=padded, tokens=1, rows=None) == [[0]]
