"""``lorakit models``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.models import BUILTINS
from tests.cli.conftest import Lorakit


def test_list_and_cache(lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    listed = json.loads(lorakit("models", "--json").out)
    assert {model["name"]: model["cached"] for model in listed["models"]} == dict.fromkeys(BUILTINS, False)
    folder = tmp_path / "models" / f"minilm-{BUILTINS['minilm'].version}-v1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    listed = json.loads(lorakit("models", "--json").out)
    assert {model["name"] for model in listed["models"] if model["cached"]} == {"minilm"}
    shown = lorakit("models").out
    assert "smollm2" in shown
    assert str(tmp_path) in shown
