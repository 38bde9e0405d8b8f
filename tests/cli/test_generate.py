"""``lorakit generate``."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.cli.conftest import Lorakit, Trained
from tests.tiny_chat import colour_rows

QUESTIONS = [row["prompt"] for row in colour_rows(3)]


def test_prompts_with_and_without_the_adapter(lorakit: Lorakit, trained: Trained) -> None:
    words = [word for question in QUESTIONS for word in ("-p", question)]
    outcome = lorakit("generate", trained.model, "--adapter", trained.adapter, *words, "-n", 8)
    assert outcome.code == 0
    assert outcome.out.split() == ["red", "green", "blue"]
    assert lorakit("generate", trained.model, *words, "-n", 8).out != outcome.out


def test_file_and_json(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*QUESTIONS, "", ""]), encoding="utf-8")
    outcome = lorakit("generate", trained.model, "-a", trained.adapter, "--file", file, "-n", 8, "--json")
    assert json.loads(outcome.out) == [
        {"prompt": question, "answer": answer}
        for question, answer in zip(QUESTIONS, ["red", "green", "blue"], strict=True)
    ]


def test_standard_input(lorakit: Lorakit, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTIONS[1]}\n"))
    assert lorakit("generate", trained.model, "-a", trained.adapter, "-n", 8).out == "green\n"


def test_system_message_is_part_of_the_prompt(lorakit: Lorakit, trained: Trained) -> None:
    asked = ["generate", trained.model, "-a", trained.adapter, "-p", QUESTIONS[0], "-n", 8]
    assert lorakit(*asked, "--system", "Answer with a very different word.").out != lorakit(*asked).out


def test_drawing_is_repeatable(lorakit: Lorakit, trained: Trained) -> None:
    asked = ["generate", trained.model, "-p", "a", "-n", 12, "-t", 3.0, "--top-k", 100, "--top-p", 0.99]
    one, again, other = (lorakit(*asked, "--seed", seed).out for seed in (1, 1, 2))
    assert one == again != other


def test_mistakes(
    lorakit: Lorakit, trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("  \n"))
    assert "nothing to answer" in lorakit("generate", trained.model).err
    assert "--top-p" in lorakit("generate", trained.model, "-p", "a", "--top-p", 1.5).err
    assert "There is no adapter" in lorakit("generate", trained.model, "-p", "a", "-a", tmp_path / "x").err
    assert "no base model 'nope'" in lorakit("generate", "nope", "-p", "a").err
    assert "No such file" in lorakit("generate", trained.model, "-f", tmp_path / "none.txt").err


def test_a_runs_folder_is_its_adapter(lorakit: Lorakit, trained: Trained) -> None:
    outcome = lorakit("generate", trained.model, "-a", trained.adapter.parent, "-p", QUESTIONS[0], "-n", 8)
    assert outcome.out == "red\n"
    outcome = lorakit("eval", trained.recipe, "--adapter", trained.adapter.parent, "--limit", 3, "--json")
    assert json.loads(outcome.out)["adapter"] == str(trained.adapter)
