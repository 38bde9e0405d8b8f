"""``lorakit classify``, and what ``train``, ``eval`` and ``merge`` say about a classifier."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorakit.cli.app import run
from tests.cli.conftest import Lorakit, Trained
from tests.tiny_chat import write_rows
from tests.tiny_encoder import kind_rows, save_tiny_encoder


@dataclass(frozen=True)
class Kinds:
    """A tiny encoder, a recipe for it, and what `lorakit train` made of it."""

    model: Path
    recipe: Path
    adapter: Path


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    folder = tmp_path_factory.mktemp("kinds")
    model = save_tiny_encoder(folder / "model")
    write_rows(folder / "rows.jsonl", kind_rows(45))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""task: classification
model: ./model
adapter: {{r: 4}}
data: {{train: rows.jsonl, test: rows.jsonl}}
train: {{max_steps: 60, batch_rows: 9, lr: 1e-2}}
output: {json.dumps(str(folder / "run"))}
""",
        encoding="utf-8",
    )
    assert run(["train", str(recipe)]) == 0
    return Kinds(model, recipe, folder / "run" / "adapter")


def test_eval_prints_scores_and_a_table_of_the_labels(lorakit: Lorakit, kinds: Kinds, tmp_path: Path) -> None:
    outcome = lorakit("eval", kinds.recipe, "--save", tmp_path / "a.jsonl")
    assert outcome.code == 0
    for word in ("accuracy", "macro_f1", "label", "precision", "recall", "F1", "animal", "colour", "tree"):
        assert word in outcome.out, word
    plain = json.loads(lorakit("eval", kinds.recipe, "--json").out)
    assert plain["scores"]["accuracy"] > 0.8
    assert [label["name"] for label in plain["labels"]] == ["animal", "colour", "tree"]
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(a["correct"] for a in answers) / 45 == pytest.approx(plain["scores"]["accuracy"])
    assert answers[0]["references"] == ["animal"]
    assert lorakit("eval", kinds.recipe, "--base").err.startswith("lorakit: ")


def test_texts_from_options_a_file_and_standard_input(
    lorakit: Lorakit, kinds: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("the oak is old\n\nred is old\n", encoding="utf-8")
    given = lorakit("classify", kinds.model, "-a", kinds.adapter, "-t", "the cat is old", "--file", file)
    assert given.code == 0, given.err
    lines = [line.split() for line in given.out.splitlines()]
    assert [line[0] for line in lines] == ["animal", "tree", "colour"]
    assert all(1 / 3 < float(line[1]) <= 1 for line in lines)
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat is old\n"))
    plain = json.loads(lorakit("classify", kinds.model, "-a", kinds.adapter, "--json").out)
    assert plain[0]["text"] == "the cat is old"
    assert plain[0]["label"] == "animal"
    assert sum(plain[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_a_merged_classifier_needs_no_adapter(lorakit: Lorakit, kinds: Kinds, tmp_path: Path) -> None:
    outcome = lorakit("merge", kinds.model, kinds.adapter, "--out", tmp_path / "merged")
    assert outcome.code == 0, outcome.err
    said = lorakit("classify", tmp_path / "merged", "-t", "the elm is old")
    assert said.out.split()[0] == "tree"
    scores = [
        json.loads(lorakit("eval", kinds.recipe, *how, "--json").out)["scores"]["accuracy"]
        for how in ((), ("--base", "--set", f"model={tmp_path / 'merged'}"))
    ]
    assert scores[0] == scores[1]


def test_mistakes(lorakit: Lorakit, kinds: Kinds, trained: Trained, tmp_path: Path) -> None:
    words = ("classify", kinds.model, "-a", kinds.adapter)
    assert "1 --second for 2 --text" in lorakit(*words, "-t", "a", "-t", "b", "--second", "c").err
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    assert "nothing to classify" in lorakit(*words, "--file", tmp_path / "empty.txt").err
    assert "use lorakit generate" in lorakit("classify", trained.model, "-a", trained.adapter, "-t", "a").err
    assert "no classification head of its own" in lorakit("classify", kinds.model, "-t", "a").err


def test_a_classifiers_adapter_writes_nothing(lorakit: Lorakit, kinds: Kinds) -> None:
    told = lorakit("generate", kinds.model, "-a", kinds.adapter, "-p", "hi")
    assert told.code == 2
    assert "trained for task: classification, and writes no texts: lorakit classify MODEL" in told.err
    said = lorakit("classify", kinds.model, "-a", kinds.adapter.parent, "-t", "cat is old")
    assert said.code == 0, said.err
    assert said.out.startswith("animal")
