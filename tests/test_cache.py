"""Where the cache is."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.cache import _system_cache, cache_folder


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LORAKIT_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "lorakit"


def test_cache_folder_expands_the_home_folder(monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", "~/models")
    assert cache_folder() == Path.home() / "models"


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "/home/me/.cache/lorakit"),
        ("darwin", {}, "/home/me/Library/Caches/lorakit"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/lorakit/cache"),
        ("win32", {}, "/home/me/AppData/Local/lorakit/cache"),
    ],
)
def test_each_system_has_its_habit(platform, environment, expected):
    assert _system_cache(platform, environment, Path("/home/me")) == Path(expected)
