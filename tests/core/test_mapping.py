"""The mapping that makes methods hashable."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

import lorakit as lk
from lorakit.core import FixedMapping, method_from_json
from tests.contracts.settings import SETTINGS


def test_it_is_the_mapping_that_it_was_made_from() -> None:
    fixed = FixedMapping({"b": 1, "a": 2})
    assert fixed == {"b": 1, "a": 2}
    assert list(fixed) == ["b", "a"]
    assert (len(fixed), fixed["a"], repr(fixed)) == (2, 2, "{'b': 1, 'a': 2}")
    assert FixedMapping() == {}


def test_equal_ones_have_equal_hashes() -> None:
    assert hash(FixedMapping({"b": 1, "a": 2})) == hash(FixedMapping({"a": 2, "b": 1}))
    assert len({FixedMapping({"a": 1}), FixedMapping({"a": 1}), FixedMapping({"a": 2})}) == 2


def test_it_cannot_be_changed() -> None:
    entries = {"a": 1}
    fixed = FixedMapping(entries)
    entries["a"] = 2
    assert fixed["a"] == 1
    with pytest.raises(TypeError):
        fixed["a"] = 3  # type: ignore[index]


def test_copies_and_pickles_are_equal() -> None:
    fixed = FixedMapping({"a": 1})
    assert copy.deepcopy(fixed) == pickle.loads(pickle.dumps(fixed)) == fixed


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_method_can_be_hashed(setting: str) -> None:
    method = SETTINGS[setting].method
    again = method_from_json(json.loads(json.dumps(method.to_json())))
    assert {method: 1}[again] == 1


def test_a_method_with_patterns_can_be_hashed() -> None:
    one = lk.DoRA(lk.LoRA(rank_pattern={"q": 2}, alpha_pattern={"v": 3}))
    assert {one: 1}[lk.DoRA(lk.LoRA(rank_pattern={"q": 2}, alpha_pattern={"v": 3}))] == 1
    assert one != lk.DoRA(lk.LoRA(rank_pattern={"q": 2}))
