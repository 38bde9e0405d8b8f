"""Routes of packed rows: the same as `lorakit.use(rows=...)` makes, token by token."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.route import OFF, Mix, Rows
from lorakit.serve.spans import Spans, of_rows, only, route_of

names = st.sampled_from([None, "a", "b", "c"])


def spans_from(rows: list[str | None]) -> Spans:
    return tuple((i + 1, rows[i]) for i in range(len(rows)) if i + 1 == len(rows) or rows[i] != rows[i + 1])


def tokens_of(spans: Spans) -> list[str | None]:
    starts = [0, *(end for end, _ in spans)]
    return [digest for (end, digest), start in zip(spans, starts, strict=False) for _ in range(end - start)]


@given(st.lists(names, min_size=1, max_size=12))
def test_a_route_says_of_every_row_what_the_spans_say(rows: list[str | None]) -> None:
    route, want = route_of(spans_from(rows)), Rows.of(rows)
    if isinstance(route, Mix):
        assert {Mix.of(row) for row in rows} == {route}
    else:
        assert [route.mixes[i] for i in route.index] == [want.mixes[i] for i in want.index]
        covered = torch.zeros(len(rows))
        for mix, where in route.groups:
            covered[where] += 1
            assert {rows[i] for i in torch.arange(len(rows))[where].tolist()} == {next(iter(mix.names), None)}
        assert covered.eq(1).all()


@given(st.lists(names, min_size=1, max_size=12), st.data())
def test_some_rows_alone(rows: list[str | None], data: st.DataObject) -> None:
    some = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1))))
    assert tokens_of(of_rows(spans_from(rows), torch.tensor(some, dtype=torch.long))) == [
        rows[i] for i in some
    ]


@given(st.lists(names, min_size=1, max_size=12), st.sets(st.sampled_from("abc")))
def test_some_adapters_told_apart(rows: list[str | None], digests: set[str]) -> None:
    kept = only(spans_from(rows), digests)
    assert tokens_of(kept) == [row if row in digests else None for row in rows]
    assert all(a != b for (_, a), (_, b) in pairwise(kept))


def test_nothing_is_the_base() -> None:
    assert route_of(()) is OFF
