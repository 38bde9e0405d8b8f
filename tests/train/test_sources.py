"""Sources: files of every form, folders, Parquet and the hub give the same rows, each with its place."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError, DataError, MissingDependencyError, RecipeError
from lorakit.train import Recipe
from lorakit.train.data import load_examples
from lorakit.train.data_sections import FileData, LabelledData
from lorakit.train.data_source import HubSplit
from lorakit.train.labelled import load_texts
from lorakit.train.sources import source_rows

ROWS = [{"prompt": f"q{i}", "completion": f'a, "{i}"\nb'} for i in range(5)]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return path
    if kind == ".csv":
        import io

        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    elif kind == ".json":
        text = json.dumps(rows, indent=1)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    "name", ["r.jsonl", "r.jsonl.gz", "r.json", "r.json.gz", "r.csv", "r.csv.gz", "r.parquet"]
)
def test_every_form_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    examples = load_examples(FileData(train=write(tmp_path / name), max_rows={"train": 4}), "train")
    assert [(e.messages[0]["content"], e.answer) for e in examples] == [
        (row["prompt"], row["completion"]) for row in ROWS[:4]
    ]
    assert f"{name}, " in examples[1].where


def test_json_lines_under_the_name_of_json(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    assert [(str(place).rpartition(", ")[2], row) for place, row in source_rows(path)] == [
        (f"line {i}", row) for i, row in enumerate(ROWS, 1)
    ]


def test_conversations_in_parquet(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a", "loss": None},
                {"role": "assistant", "content": "b", "loss": loss},
            ]
        }
        for loss in (None, True)
    ]
    examples = load_examples(FileData(train=write(tmp_path / "r.parquet", rows)), "train")
    assert [(e.turns, e.learnt_turns) for e in examples] == [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], (1,))
    ] * 2


def test_conversations_in_csv(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b, c"}]
    path = write(tmp_path / "r.csv", [{"messages": json.dumps(turns)}])
    (example,) = load_examples(FileData(train=path), "train")
    assert example.turns == turns


def test_long_cells_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", [{"prompt": "x" * 200_000, "completion": "y"}])
    (example,) = load_examples(FileData(train=path), "train")
    assert len(example.messages[0]["content"]) == 200_000


def test_damaged_parquet_and_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "r.parquet")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"r\.parquet, after row 0: the Parquet file is damaged"):
        list(source_rows(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"r\.parquet needs pyarrow.*lorakit\[data\]"):
        list(source_rows(path))


# ---- plain text
def test_rows_of_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("\n one\ntwo\r\n\r\n \n\nthree\n", encoding="utf-8")

    def rows(**settings: Any) -> list[tuple[str, str]]:
        examples = load_examples(FileData(train=path, **settings), "train")
        return [(e.where.rpartition(", ")[2], e.answer) for e in examples]

    assert rows() == [("line 2", "one\ntwo"), ("line 7", "three")]
    assert rows(texts="line") == [("line 2", "one"), ("line 3", "two"), ("line 7", "three")]
    ((place, whole),) = rows(texts="file")
    assert (place, whole.split()) == ("line 2", ["one", "two", "three"])
    path.write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match=r"t\.txt is empty: expected text"):
        rows()


# ---- folders
def test_a_folder_gives_all_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", ROWS[3:])
    write(tmp_path / "a.csv", ROWS[:3])
    (tmp_path / "c.txt").write_text("A text.", encoding="utf-8")
    (tmp_path / "README.md").write_text("no data", encoding="utf-8")
    (tmp_path / ".hidden.jsonl").write_text("{", encoding="utf-8")
    examples = load_examples(FileData(train=tmp_path), "train")
    assert [e.answer for e in examples] == [row["completion"] for row in ROWS] + ["A text."]
    assert [Path(e.where.partition(",")[0]).name for e in examples] == ["a.csv"] * 3 + ["b.jsonl"] * 2 + [
        "c.txt"
    ]
    assert len(load_examples(FileData(train=tmp_path, max_rows={"train": 4}), "train")) == 4


def test_labelled_texts_from_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "x", "label": "1"}])
    write(tmp_path / "b.csv", [{"text": "y", "label": "2"}])
    (tmp_path / "notes.txt").write_text("not a table", encoding="utf-8")
    assert [(t.text, t.label) for t in load_texts(LabelledData(train=tmp_path), "train")] == [
        ("x", "1"),
        ("y", "2"),
    ]


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no data files \(.*\.csv.*\)\. It is empty"):
        load_examples(FileData(train=tmp_path), "train")
    (tmp_path / "a.doc").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"It holds a\.doc\."):
        load_examples(FileData(train=tmp_path), "train")


def test_an_ending_that_tells_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl").rename(tmp_path / "rows.data")
    with pytest.raises(ConfigError, match=r"ending of rows\.data does not tell.*set data\.files"):
        load_examples(FileData(train=path), "train")
    assert len(load_examples(FileData(train=path, files="jsonl"), "train")) == 5


# ---- the hub
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hub:a/b:train", HubSplit("a/b", "train")),
        ("hub:a/b.c@v1/en-US:train[:10%]", HubSplit("a/b.c", "train[:10%]", "en-US", "v1")),
        ("hub:a-1/b_2/conf:test+valid", HubSplit("a-1/b_2", "test+valid", "conf")),
    ],
)
def test_names_of_the_hub_are_read_and_written(text: str, parts: HubSplit) -> None:
    assert HubSplit.parse(text) == parts
    assert str(parts) == text
    recipe = Recipe.from_mapping({"model": "m", "data": {"train": text}, "output": "o"}, folder="/somewhere")
    assert recipe.plain()["data"]["train"] == text
    assert Recipe.from_mapping(recipe.plain()).data.train == parts  # type: ignore[attr-defined]


def test_a_wrong_name_of_the_hub() -> None:
    for wrong in ("hub:squad:train", "hub:a/b"):
        with pytest.raises(RecipeError, match=r"data\.train.*hub:OWNER/NAME:SPLIT"):
            Recipe.from_mapping({"model": "m", "data": {"train": wrong}, "output": "o"})
    with pytest.raises(RecipeError, match=r"data\.train.*should be a path"):
        Recipe.from_mapping({"model": "m", "data": {"train": 5}, "output": "o"})


def test_the_hub_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(
        DataError, match=r"hub:nobody/nothing:train could not be loaded from the hub: .*network"
    ):
        list(source_rows(HubSplit("nobody/nothing", "train")))


def test_what_datasets_has_in_its_cache_is_read_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    files = {"train": str(write(tmp_path / "r.jsonl"))}
    datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    (made,) = (tmp_path / "cache" / "json").iterdir()
    (tmp_path / "cache" / "someone___rows").mkdir()
    made = made.rename(tmp_path / "cache" / "someone___rows" / "default")  # as after a download from the hub
    (arrow,) = made.rglob("json-train.arrow")
    arrow.rename(arrow.with_name("rows-train.arrow"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = FileData.model_validate({"train": "hub:someone/rows:train[:2]"})
    assert [e.answer for e in load_examples(data, "train")] == [row["completion"] for row in ROWS[:2]]


def test_the_hub_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"hub:a/b:train needs datasets.*lorakit\[data\]"):
        list(source_rows(HubSplit("a/b", "train")))


def test_rows_of_the_hub_have_places(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = FileData.model_validate({"train": "hub:a/b@main/c:train", "max_rows": {"train": 2}})
    examples = load_examples(data, "train")
    assert asked == [(("a/b", "c"), {"split": "train", "revision": "main"})]
    assert [e.answer for e in examples] == [row["completion"] for row in ROWS[:2]]
    assert examples[1].where == "hub:a/b@main/c:train, row 2"
