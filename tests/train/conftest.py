"""A tiny chat model on disk, and recipes for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.train import Recipe
from tests.tiny_chat import colour_rows, save_tiny_chat, write_rows


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Make a recipe for the tiny model on the colours; keywords replace sections or add to ``train``."""

    def make(output: str = "run", sections: dict[str, Any] | None = None, **train: Any) -> Recipe:
        data = tmp_path / "train.jsonl"
        if not data.exists():
            write_rows(data, colour_rows(24))
        return Recipe.from_mapping(
            {
                "model": str(tiny_folder),
                "adapter": {"r": 4, "alpha": 8},
                "data": {"train": str(data), "test": str(data)},
                "train": {"max_steps": 6, "batch_rows": 4, "lr": 1e-2, **train},
                "output": str(tmp_path / output),
                **(sections or {}),
            }
        )

    return make
