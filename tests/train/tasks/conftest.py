"""Tiny models for each kind of task, and recipes for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lorakit.train import Recipe
from tests.tiny_chat import write_rows
from tests.tiny_encoder import save_tiny_encoder
from tests.tiny_writers import save_tiny_bart, save_tiny_t5

MakeTask = Callable[..., Recipe]


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("model") / "encoder")


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_t5(tmp_path_factory.mktemp("model") / "t5")


@pytest.fixture(scope="session")
def bart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bart(tmp_path_factory.mktemp("model") / "bart")


@pytest.fixture
def make_task(tmp_path: Path) -> MakeTask:
    """Make a recipe whose splits are all the same rows; keywords replace sections, ``train`` is added to."""

    def make(task: str, model: Path, rows: Sequence[Any], output: str = "run", **sections: Any) -> Recipe:
        file = str(write_rows(tmp_path / f"{output}.jsonl", list(rows)))
        return Recipe.from_mapping(
            {
                "task": task,
                "model": str(model),
                "adapter": {"r": 4, "alpha": 8},
                "output": str(tmp_path / output),
                **sections,
                "data": {"train": file, "valid": file, "test": file, **sections.get("data", {})},
                "train": {
                    "max_steps": 40,
                    "batch_rows": 8,
                    "lr": 1e-2,
                    **sections.get("train", {}),
                },
            }
        )

    return make
