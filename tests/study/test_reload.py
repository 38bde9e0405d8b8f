"""The answers of another process are those of `evaluate` here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from lorakit.train import Recipe, evaluate, train
from tests.tiny_chat import save_tiny_chat


def test_a_fresh_process_answers_the_same(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": str(save_tiny_chat(tmp_path / "tiny")),
                "data": {"builtin": "text_to_sql", "train": 8, "test": 3},
                "train": {"max_steps": 2, "lr": 0.01},
                "generate": {"max_new_tokens": 8},
                "output": str(tmp_path / "run"),
            }
        )
    )
    trained = train(Recipe.from_file(recipe))
    here = evaluate(Recipe.from_file(recipe), adapter=trained.adapter, limit=2)
    command = [sys.executable, "-m", "lorakit.study.reload", str(recipe), str(trained.adapter), "2"]
    there = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(there.stdout) == [answer.answer for answer in here.answers]
