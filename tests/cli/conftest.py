"""Running the program, and a trained adapter to run it on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorakit.cli.app import run
from tests.tiny_chat import colour_rows, save_tiny_chat, write_rows


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


Lorakit = Callable[..., Outcome]


@pytest.fixture
def lorakit(capsys: pytest.CaptureFixture[str]) -> Lorakit:
    """Run a command in this process."""

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = run([str(word) for word in words])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


@dataclass(frozen=True)
class Trained:
    """A tiny model, a recipe for it, and what `lorakit train` made of it."""

    model: Path
    recipe: Path
    adapter: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    model = save_tiny_chat(folder / "model")
    write_rows(folder / "rows.jsonl", colour_rows(12))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""model: ./model
adapter: {{name: colours, r: 8, alpha: 16}}
data: {{train: rows.jsonl, test: rows.jsonl}}
train: {{max_steps: 60, batch_rows: 12, lr: 1e-2, save_every: 50}}
generate: {{max_new_tokens: 8}}
evaluate: {{metrics: [exact_match, loss]}}
output: {json.dumps(str(folder / "run"))}
""",
        encoding="utf-8",
    )
    assert run(["train", str(recipe)]) == 0
    return Trained(model, recipe, folder / "run" / "adapter")
