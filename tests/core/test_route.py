"""Routes as values."""

from __future__ import annotations

import pytest
import torch

from lorakit.core import OFF, Mix, Rows
from lorakit.errors import RoutingError


@pytest.mark.parametrize(
    ("route", "weights"),
    [
        (None, ()),
        ("a", (("a", 1.0),)),
        ({"b": 2, "a": 0.5}, (("a", 0.5), ("b", 2.0))),
        (["b", "a"], (("a", 1.0), ("b", 1.0))),
        ((), ()),
        ({}, ()),
    ],
)
def test_a_mix_of_what_a_user_writes(route: object, weights: tuple[tuple[str, float], ...]) -> None:
    mix = Mix.of(route)  # type: ignore[arg-type]
    assert mix.weights == weights
    assert mix.names == tuple(name for name, _ in weights)


def test_equal_mixes_are_equal_whatever_their_order() -> None:
    assert Mix.of({"b": 0.3, "a": 0.7}) == Mix.of({"a": 0.7, "b": 0.3})
    assert hash(Mix.of(["a", "b"])) == hash(Mix.of(["b", "a"]))
    assert Mix.of(None) == OFF


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(RoutingError, match=r"twice.*weights"):
        Mix.of(["a", "b", "a"])


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(weight: float) -> None:
    with pytest.raises(RoutingError, match="finite"):
        Mix.of({"a": weight})


def test_without_what_is_merged() -> None:
    mix = Mix.of({"a": 0.5, "b": 1.0})
    assert mix.without(OFF) == mix
    assert mix.without(Mix.of({"a": 0.5})) == Mix.of("b")
    assert mix.without(mix) == OFF
    for merged in (Mix.of("a"), Mix.of("c")):
        with pytest.raises(RoutingError, match="unmerge"):
            mix.without(merged)


def test_rows_group_equal_routes() -> None:
    rows = Rows.of(["a", {"b": 0.5}, None, "a", {"b": 0.5}])
    assert rows.mixes == (Mix.of("a"), Mix.of({"b": 0.5}), OFF)
    assert rows.index == (0, 1, 2, 0, 1)
    assert rows.names == ("a", "b")


def test_neighbours_are_a_slice_and_others_an_index() -> None:
    groups = dict(Rows.of(["a", "a", "b", None, "b"]).groups)
    assert groups[Mix.of("a")] == slice(0, 2)
    assert groups[OFF] == slice(3, 4)
    scattered = groups[Mix.of("b")]
    assert isinstance(scattered, torch.Tensor)
    assert scattered.tolist() == [2, 4]


def test_every_row_is_in_exactly_one_group() -> None:
    names = ["a", None, "b", "a", "c", "b", None, "a"]
    seen: list[int] = []
    for _, rows in Rows.of(names).groups:
        seen += range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
    assert sorted(seen) == list(range(len(names)))


def test_rows_take_a_sequence_and_not_a_string() -> None:
    with pytest.raises(RoutingError, match="one entry per row"):
        Rows.of("ab")


def test_rows_without_what_is_merged() -> None:
    rows = Rows.of([["a", "b"], "a"]).without(Mix.of("a"))
    assert rows.mixes == (Mix.of("b"), OFF)
    assert rows.index == (0, 1)
    with pytest.raises(RoutingError, match="the base model"):
        Rows.of(["a", None]).without(Mix.of("a"))


def test_rows_are_equal_by_what_they_route() -> None:
    assert Rows.of(["a", None]) == Rows.of(["a", None])
    assert Rows.of(["a", None]) != Rows.of([None, "a"])


def test_places_put_the_groups_back_in_order() -> None:
    route = Rows.of(["a", "b", None, "a"])
    numbers, back = route.places()
    assert [n.tolist() for n in numbers] == [[0, 3], [1], [2]]
    assert torch.cat(numbers)[back].tolist() == [0, 1, 2, 3]
