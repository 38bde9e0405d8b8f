"""Which adapters belong together."""

from __future__ import annotations

import pytest

import lorakit as lk
from lorakit.adapters.together import Together
from lorakit.errors import ConfigError
from tests.adapters.states import linear, random_state


def adapter(*paths: str, base: str | None = None) -> lk.AdapterState:
    return random_state(dict.fromkeys(paths, lk.LoRA(r=1)), dict.fromkeys(paths, linear()), base=base)


def test_targets_in_order_and_who_has_them() -> None:
    found = Together([adapter("b", "a"), adapter("c", "a", base="x")])
    assert list(found.shapes) == ["b", "a", "c"]
    assert [found.holders(path) for path in found.shapes] == [[0], [0, 1], [1]]
    assert found.base == "x"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("org/m", "/data/M/", True),
        ("C:\\models\\m", "m", True),
        ("org/m", "org/m-chat", False),
        (None, "m", True),
    ],
)
def test_bases_are_known_by_the_last_part_of_their_names(one: str | None, other: str, same: bool) -> None:
    states = [adapter("a", base=one), adapter("a", base=other)]
    if same:
        Together(states)
        return
    with pytest.raises(ConfigError, match="different base models"):
        Together(states)
    assert Together(states, any_base=True).base == one
