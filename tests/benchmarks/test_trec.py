"""The study of the methods on TREC: its list is sound, and the command runs, goes on, and writes the page."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import trec
from benchmarks.trec import BEGIN, END, SETTINGS, between_markers, common, main, select
from lorakit.train import Recipe
from tests.tiny_encoder import kind_rows, save_tiny_encoder


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_is_a_sound_recipe(setting: Any, tmp_path: Path) -> None:
    shared = common(tmp_path, rows=1000, epochs=6, model="minilm")
    recipe = Recipe.from_mapping(setting.recipe(shared, tmp_path / "out"))
    assert recipe.task == "classification"
    assert recipe.train.lr > 0


def test_a_selection_keeps_the_order_and_names_what_is_not_there() -> None:
    assert [s.name for s in select(["DoRA", "LoRA"])] == ["LoRA", "DoRA"]
    assert select(None) == SETTINGS
    with pytest.raises(SystemExit, match="no method 'Lora'"):
        select(["Lora"])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, count in (("train", 36), ("valid", 9), ("test", 9)):
        rows = [{"text_a": row["text"], "label_name": row["label"]} for row in kind_rows(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path


def test_the_command_runs_goes_on_and_writes_the_page(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(trec, "PAGE", page)
    model = save_tiny_encoder(tmp_path / "model")
    words = [
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--rows",
        18,
        "--epochs",
        1,
        "--model",
        model,
        "--page",
    ]
    main([*map(str, words), "--only", "LoRA"])
    before = (tmp_path / "out" / "lora.json").stat().st_mtime_ns
    main([*map(str, words), "--only", "LoRA", "DoRA"])
    assert (tmp_path / "out" / "lora.json").stat().st_mtime_ns == before
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    for word in ("| LoRA | ", "| DoRA | ", "18 rows scored"):
        assert word in text
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") in text


def test_only_what_stands_between_the_markers_changes() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert between_markers(page, "new\n") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(SystemExit, match="once each"):
        between_markers("no markers", "new\n")


def test_the_page_of_the_documentation_has_its_markers() -> None:
    assert "x" in between_markers(trec.PAGE.read_text(encoding="utf-8"), "x\n")
