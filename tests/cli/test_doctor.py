"""``lorakit doctor``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Lorakit


def test_it_tells_and_measures_once(
    lorakit: Lorakit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    found = json.loads(lorakit("doctor", "--json").out)
    assert found["rates"]["cpu"]["float32"] > 0
    assert found["versions"]["torch"]
    assert found["libraries"]["peft"]
    assert found["advice"]
    again = json.loads(lorakit("doctor", "--json").out)
    assert again["rates"] == found["rates"]  # from the cache: two measurements are never equal
    words = lorakit("doctor")
    assert words.code == 0
    assert "Use here:" in words.out
    assert "GFLOP/s" in words.out
