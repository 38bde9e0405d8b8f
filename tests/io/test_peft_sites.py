"""Which target a group of keys belongs to."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core import effort
from lorakit.core.effort import shared_effort
from lorakit.core.endings import smallest_pattern
from lorakit.core.selection import pattern_matches
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.io.outline import Outline
from lorakit.io.peft_config import DEFAULTS
from lorakit.io.peft_keys import Found
from lorakit.io.peft_rules import ATTENTION_IN, ATTENTION_OUT, LINEAR, PARAMETER
from lorakit.io.peft_sites import Patterns, find_sites, unwrapped

PAIR = {"lora_A": Found("A", torch.zeros(2, 6)), "lora_B": Found("B", torch.zeros(4, 2))}


def sites(*starts: str, outline: Outline | None = None, **settings: Any) -> dict[str, Any]:
    found = find_sites(dict.fromkeys(starts, PAIR), {**DEFAULTS, **settings}, None, outline)
    return {site.path: (site.rule, site.start) for site in found}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.base_layer", ("a", 1)),
        ("a.base_layer.base_layer", ("a", 2)),
        ("a.base_layer.b", ("a.b", 0)),
        ("x.base_layer", ("x.base_layer", 0)),  # a module of the user's that is called so
        ("x.base_layer.fc", ("x.base_layer.fc", 0)),
        ("a", ("a", 0)),
    ],
)
def test_unwrapped(path: str, expected: tuple[str, int]) -> None:
    assert unwrapped(path, {"a", "a.base_layer"}) == expected


def test_attention() -> None:
    assert sites("x.attn", "x.attn.base_layer.out_proj") == {
        "x.attn.in_proj_weight": (ATTENTION_IN, "x.attn"),
        "x.attn.out_proj": (ATTENTION_OUT, "x.attn.base_layer.out_proj"),
    }
    assert sites("x.attn", "x.attn.out_proj") == {
        "x.attn": (LINEAR, "x.attn"),
        "x.attn.out_proj": (LINEAR, "x.attn.out_proj"),
    }


def test_parameters_are_numbered_from_the_inside() -> None:
    expected = {
        "mlp.experts.gate_up_proj": (PARAMETER, "mlp.experts.base_layer"),
        "mlp.experts.down_proj": (PARAMETER, "mlp.experts"),
    }
    entries = ["experts.down_proj", "experts.gate_up_proj"]
    assert sites("mlp.experts", "mlp.experts.base_layer", target_parameters=entries) == expected
    other = Outline({"mlp.experts.down_proj": (4, 6), "mlp.experts.gate_up_proj": (4, 6)})
    swapped = sites("mlp.experts", "mlp.experts.base_layer", target_parameters=entries, outline=other)
    assert swapped["mlp.experts.gate_up_proj"] == (PARAMETER, "mlp.experts")


def test_a_layer_inside_a_module_with_adapted_parameters() -> None:
    found = sites("mlp", "mlp.base_layer.gate", target_parameters=["mlp.scale"], target_modules=["gate"])
    assert found == {"mlp.scale": (PARAMETER, "mlp"), "mlp.gate": (LINEAR, "mlp.base_layer.gate")}


def test_a_bare_name_means_no_layer_that_target_modules_names() -> None:
    found = sites("mlp", "fc", target_parameters=["scale"], target_modules=["fc"])
    assert found == {"mlp.scale": (PARAMETER, "mlp"), "fc": (LINEAR, "fc")}


def test_an_order_that_cannot_be_known() -> None:
    with pytest.raises(AdapterFileError, match="in the order in which the module holds them"):
        sites("m", "m.base_layer", target_parameters=["m.alpha", "m.beta"])
    held = Outline({"m.beta": (4, 6), "m.other": (1,), "m.alpha": (4, 6)})
    found = sites("m", "m.base_layer", target_parameters=["m.alpha", "m.beta"], outline=held)
    assert found == {"m.beta": (PARAMETER, "m.base_layer"), "m.alpha": (PARAMETER, "m")}


def test_as_many_levels_as_names() -> None:
    with pytest.raises(AdapterFileError, match="1 adapted parameters of 'm', the configuration names 2"):
        sites("m", target_parameters=["m.up_proj", "m.down_proj"])
    with pytest.raises(AdapterFileError, match="names no target_parameters"):
        sites("m", "m.base_layer")


def test_patterns_answer_as_one_by_one() -> None:
    pattern = {
        r"^a\.b": 1,
        "b": 2,
        r"a\.b": 0,
        "a.b": 3,
        r"^c\.d": 4,
        "^c.e": 5,
        r"^c\.e": 6,
        "x.*": 7,
        r"^x\.y": 8,
        r"k\.l.m\-n": 10,
        "k.l.m": 11,
        r"c\+\.d": 12,
        "d[q]": 13,
    }
    fast = Patterns(pattern, 0)
    others = ("k.l.m-n", "k.l_m-n", "kxl.m-n", "a.k_l.m", "k.lm", "c+.d", "d[q]", "a.d[q]")
    for path in ("a.b", "z.b", "c.d", "c.e", "q.c.d", "x.y", "x.xq", "none", "cxe", *others):
        slow = next((value for key, value in pattern.items() if pattern_matches(key, path)), 0)
        assert fast[path] == slow, path


paths = st.lists(st.sampled_from(["a", "b", "0", "10", "a+b", "ab"]), min_size=1, max_size=3).map(".".join)


@given(
    st.dictionaries(paths, st.integers(1, 3), min_size=1, max_size=9),
    st.lists(st.sampled_from(["a", "a.b", ".*", "[ab]", "^a", "^a.b"]), max_size=2),
)
def test_written_patterns_are_looked_up_as_they_would_match(
    values: dict[str, int], others: list[str]
) -> None:
    default, pattern = smallest_pattern(values)
    pattern = {**dict.fromkeys(others[:1], 9), **pattern, **dict.fromkeys(others[1:], 8)}
    fast = Patterns(pattern, default)
    for path in values:
        assert fast[path] == next((v for key, v in pattern.items() if pattern_matches(key, path)), default)


@pytest.mark.parametrize("written", [str, re.escape, lambda path: "^" + path])
def test_a_key_for_each_of_many_targets(written: Any) -> None:
    paths_ = [f"model.layers.{n}.self_attn.{name}_proj" for n in range(500) for name in "qkvo"]
    started = time.perf_counter()
    with shared_effort():
        found = Patterns({written(path): n for n, path in enumerate(paths_)}, None)
        assert [found[path] for path in paths_] == list(range(2_000))
    assert time.perf_counter() - started < 5


def test_all_patterns_of_a_file_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "_STEPS_OF_A_FILE", 10**6)  # a tenth, for a quick test
    hostile: list[list[str]] = [
        [rf"(\w+\.)*(a|b){n}" for n in range(3_000)],
        [rf"[a-z]{n}" for n in range(100_000)],
        ["".join("." if n >> bit & 1 else "m" for bit in range(17)) for n in range(2**17)],
        ["m" * n for n in range(1, 3_000)],
    ]

    def read(keys: list[str]) -> None:
        found = Patterns(dict.fromkeys(keys, 1), 0)
        for n in range(10_000):
            assert found[f"model.layers.{n}.some.{'x' * 17}"] in (0, 1)

    for keys in hostile:
        started = time.perf_counter()
        with shared_effort(), pytest.raises(ConfigError, match="too many steps"):
            read(keys)
        assert time.perf_counter() - started < 5
