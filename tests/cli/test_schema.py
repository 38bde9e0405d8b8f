"""``lorakit schema``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Lorakit


def test_the_schema_is_printed_or_written(lorakit: Lorakit, tmp_path: Path) -> None:
    printed = json.loads(lorakit("schema").out)
    assert printed["title"] == "lorakit recipe"
    assert lorakit("schema", "--out", tmp_path / "s.json").code == 0
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8")) == printed
