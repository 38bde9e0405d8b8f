"""Every key of a recipe as a flag."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorakit as lk
from lorakit.cli.recipe_options import _flags
from lorakit.train.recipe_keys import recipe_keys
from tests.cli.conftest import Lorakit, Trained


def test_there_is_a_flag_for_every_key() -> None:
    assert [option.opts for option in _flags()] == [[f"--{key.name}"] for key in recipe_keys()]


def test_flags_reach_the_recipe_and_go_before_set(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    outcome = lorakit(
        "train", trained.recipe, "--set", "adapter.r=3", "--adapter.r", 2, "--train.max_steps=2",
        "--train.lr", "1e-5", "--adapter.targets", "[q_proj, v_proj]", "--output", tmp_path / "o",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    state = lk.read(tmp_path / "o" / "adapter")
    assert {method.r for method in state.spec.methods.values()} == {2}  # type: ignore[attr-defined]
    assert {path.rsplit(".", 1)[1] for path in state.spec.methods} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("flag", "meant"), [("--train.lrr", "--train.lr"), ("--adapter.alhpa", "--adapter.alpha")]
)
def test_a_typo_names_what_was_meant(lorakit: Lorakit, trained: Trained, flag: str, meant: str) -> None:
    outcome = lorakit("train", trained.recipe, flag, "1")
    assert outcome.code == 2
    assert f"No such option: {flag}" in outcome.err
    assert meant in outcome.err.split("No such option", 1)[1].replace(flag, "")


def test_a_value_of_the_wrong_kind_names_the_key(lorakit: Lorakit, trained: Trained) -> None:
    outcome = lorakit("train", trained.recipe, "--train.lr", "fast")
    assert outcome.code == 2
    assert "'train.lr' is wrong" in outcome.err


def test_help_tells_sections_defaults_and_choices(lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    outcome = lorakit("train", "--help")
    assert outcome.code == 0
    for text in (
        "Recipe: train",
        "--train.lr",
        "[0.0002]",
        "linear|cosine|constant",
        "--adapter.rank_pattern",
    ):
        assert text in outcome.out
