"""The demo's steps on a tiny model; the real one is run by `make demo` and, marked slow, here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lorakit.study.demo import DemoResult, run
from lorakit.train import Recipe
from tests.tiny_chat import save_tiny_chat


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    folder = tmp_path_factory.mktemp("demo")
    model = save_tiny_chat(folder / "tiny")
    return run(folder / "out", model=str(model), examples=16, questions=4)


def test_it_trains_merges_and_reloads(result: DemoResult) -> None:
    assert result.unmerged_exactly
    assert result.reloaded_equal == result.reloaded == 4
    assert 0 < result.merge_difference < 1e-3 * result.largest_logit
    assert 0 < result.trainable < result.base_parameters


def test_it_leaves_its_files(result: DemoResult) -> None:
    adapter = Path(result.adapter)
    assert result.adapter_bytes == sum(file.stat().st_size for file in adapter.iterdir())
    assert (adapter / "adapter_model.safetensors").exists()
    assert result.plot is not None
    assert Path(result.plot).stat().st_size > 1000
    assert json.loads((adapter.parent / "result.json").read_text())["examples"] == 16
    assert Recipe.from_file(result.recipe).adapter.name == "sql"


def test_the_table_says_what_was_measured(result: DemoResult) -> None:
    told = dict(result.rows())
    assert f"{result.trainable:,}" in told["trainable parameters"]
    assert told["base weights after unmerge"] == "the same, bit for bit"
    assert replace(result, unmerged_exactly=False).rows() != result.rows()


@pytest.mark.parametrize(
    "broken",
    [{"accuracy_after": 0.0}, {"merge_difference": 1.0}, {"unmerged_exactly": False}, {"reloaded_equal": 3}],
    ids=lambda broken: next(iter(broken)),
)
def test_a_result_is_sound_only_when_everything_held(result: DemoResult, broken: dict[str, float]) -> None:
    good = replace(result, accuracy_before=0.1, accuracy_after=0.6)
    assert good.sound
    assert not replace(good, **broken).sound  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.model
def test_the_real_model_learns(tmp_path: Path) -> None:
    result = run(tmp_path / "out", examples=256, questions=40)
    assert result.sound
    assert result.accuracy_after >= result.accuracy_before + 0.15
