"""The rules of choosing by name, and what is said when a name matches nothing."""

from __future__ import annotations

import pytest

from lorakit.core.selection import (
    ends_with,
    entry_matches,
    fullmatch,
    pattern_matches,
    unmatched,
    unmatched_expression,
)
from lorakit.errors import ConfigError, UnmatchedTargetError

PATHS = [
    f"model.layers.{i}.{name}" for i in (0, 1, 10) for name in ("attn.q_proj", "attn.v_proj", "mlp.up_proj")
]


@pytest.mark.parametrize(
    ("path", "entry", "expected"),
    [
        ("a.q_proj", "q_proj", True),
        ("q_proj", "q_proj", True),
        ("a.q_proj", "a.q_proj", True),
        ("a.my_q_proj", "q_proj", False),
        ("a.q_proj.b", "q_proj", False),
        ("a.q_proj", "Q_PROJ", False),
        ("a.q_proj", "q.proj", False),
    ],
)
def test_an_entry_names_a_path_or_the_end_of_one(path: str, entry: str, expected: bool) -> None:
    assert ends_with(path, entry) is expected
    assert entry_matches(entry, [path]) == ([path] if expected else [])


def test_a_layer_number_is_not_matched_by_its_digits() -> None:
    assert entry_matches("0.attn.q_proj", PATHS) == ["model.layers.0.attn.q_proj"]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            "q_proj",
            ["model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj", "model.layers.10.attn.q_proj"],
        ),
        (r"layers\.1\.attn\.(q|v)_proj", ["model.layers.1.attn.q_proj", "model.layers.1.attn.v_proj"]),
        ("q_proj|up_proj", [p for p in PATHS if not p.endswith("v_proj")]),
        ("proj", []),
        ("^q_proj", []),
        (r"^model\.layers\.0\..*", [p for p in PATHS if ".0." in p]),
        ("attn", []),
    ],
)
def test_a_rank_pattern_is_an_expression_for_the_end_of_the_path(key: str, expected: list[str]) -> None:
    assert [path for path in PATHS if pattern_matches(key, path)] == expected


def test_peft_agrees_about_rank_patterns() -> None:
    """PEFT 0.21: ``get_pattern_key``, the function that decides there."""
    from peft.utils.other import get_pattern_key

    keys = ["q_proj", r"layers\.1\..*", ".*up_proj", "^model", "proj", "0.attn.v_proj", r"mlp\.up_proj"]
    for path in PATHS:
        for key in keys:
            expected = get_pattern_key([key], path) == key  # it answers with the path when no key matches
            assert pattern_matches(key, path) == expected, (key, path)


def test_an_expression_matches_whole_paths() -> None:
    assert fullmatch(r".*\.1\..*(q|v)_proj", PATHS) == [
        "model.layers.1.attn.q_proj",
        "model.layers.1.attn.v_proj",
    ]
    assert fullmatch("q_proj", PATHS) == []


@pytest.mark.parametrize(
    "call", [lambda: fullmatch("q_(proj", PATHS), lambda: pattern_matches("q_(proj", "a")]
)
def test_a_broken_expression_is_named(call: object) -> None:
    with pytest.raises(ConfigError, match=r"q_\(proj.*not a regular expression"):
        call()  # type: ignore[operator]


def test_near_matches_are_suggested_and_what_there_is_is_listed() -> None:
    error = unmatched("q_porj", PATHS)
    assert isinstance(error, UnmatchedTargetError)
    assert "'q_porj'" in str(error)
    assert "Did you mean 'q_proj'" in str(error)
    assert "up_proj" in str(error)
    assert "Did you mean" not in str(unmatched("zzz", PATHS))


def test_the_end_of_a_long_entry_is_what_is_compared() -> None:
    assert "Did you mean 'q_proj'" in str(unmatched("model.layers.7.attn.q_prj", PATHS))


def test_a_name_given_as_an_expression_is_explained() -> None:
    assert "give a list: ['q_proj']" in str(unmatched_expression("q_proj", PATHS))
    assert "Did you mean 'all-linear'" in str(unmatched_expression("all_linear", PATHS))


def test_a_long_list_of_names_is_cut() -> None:
    error = str(unmatched("x", [f"layer{i}" for i in range(100)]))
    assert "(80 more)" in error
