"""The guide to data: every sample in it is read, as the format under whose heading it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lorakit.train.data import load_examples
from lorakit.train.data_sections import FileData
from lorakit.train.formats import FORMATS, readings
from lorakit.train.pairs import load_preferences
from tests.tiny_chat import write_rows

GUIDE = (Path(__file__).parents[2] / "docs" / "guide" / "data.md").read_text(encoding="utf-8")
SAMPLES = {
    heading: re.findall(r"```json\n(.*?)```", body, re.DOTALL)
    for heading, body in re.findall(r"^### (\w+)\n(.*?)(?=^##)", GUIDE, re.DOTALL | re.MULTILINE)
}


def test_every_format_has_a_heading() -> None:
    assert set(FORMATS) <= set(SAMPLES)


@pytest.mark.parametrize("name", [name for name, blocks in SAMPLES.items() if blocks])
def test_samples_are_read(name: str, tmp_path: Path) -> None:
    for number, block in enumerate(SAMPLES[name]):
        rows = [json.loads(line) for line in block.splitlines()]
        data = FileData(train=write_rows(tmp_path / f"{number}.jsonl", list(rows)))
        assert {reading.format for reading in readings(data, "train")} == {name}
        found = load_preferences(data, "train") if name == "preference" else load_examples(data, "train")
        assert len(found) == len(rows)
