"""Endings of paths name targets: briefly, and never one too many."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.endings import endings, shortest_endings, smallest_pattern
from lorakit.core.selection import pattern_matches

paths = st.lists(
    st.sampled_from(["layers", "0", "1", "10", "q_proj", "a+b", "fc", "x"]), min_size=1, max_size=4
).map(".".join)


def test_endings() -> None:
    assert endings("a.b.c") == ["c", "b.c", "a.b.c"]


@given(st.dictionaries(paths, st.integers(1, 3), min_size=1, max_size=12))
def test_a_pattern_gives_every_target_its_value(values: dict[str, int]) -> None:
    default, pattern = smallest_pattern(values)
    for order in (pattern, dict(sorted(pattern.items()))):  # the file is sorted
        for path, value in values.items():
            assert next((v for key, v in order.items() if pattern_matches(key, path)), default) == value


def test_patterns_are_brief() -> None:
    values = {f"layers.{n}.{p}": 8 for n in range(30) for p in ("q_proj", "v_proj")}
    assert smallest_pattern(values) == (8, {})
    assert smallest_pattern({**values, **{f"layers.{n}.o_proj": 4 for n in range(30)}}) == (8, {"o_proj": 4})
    assert smallest_pattern({**values, "layers.1.q_proj": 4}) == (8, {r"1\.q_proj": 4})
    assert smallest_pattern({"fc": 4, "a.fc": 8, "b.fc": 8}) == (8, {"^fc": 4})  # the ending of the others
    assert smallest_pattern({}) == (8, {})


@given(st.lists(paths, max_size=12))
def test_shortest_endings_are_different(found: list[str]) -> None:
    named = shortest_endings(found)
    assert set(named) == set(found)
    assert all(path == ending or path.endswith("." + ending) for path, ending in named.items())
    assert len(set(named.values())) == len(named)


def test_shortest_endings() -> None:
    assert shortest_endings(["attn1.to_q", "attn2.to_q", "ff.proj"]) == {
        "attn1.to_q": "attn1.to_q",
        "attn2.to_q": "attn2.to_q",
        "ff.proj": "proj",
    }
    assert shortest_endings(["output.dense", "attention.output.dense"]) == {
        "output.dense": "output.dense",
        "attention.output.dense": "attention.output.dense",
    }
