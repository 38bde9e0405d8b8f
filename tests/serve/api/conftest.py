"""One server that the tests of a file share; tests that break a server start their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.http_world import Running, World, save_world


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and adapters that no test may change."""
    return save_world(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def world(folder: Path) -> Iterator[World]:
    with Running(folder) as running:
        yield running


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """The same for a test that changes files."""
    return Path(shutil.copytree(folder, tmp_path / "own"))
