"""What our files carry in the metadata of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import AdapterFileError
from lorakit.io.embedded import Embedded, embedded_in, parse_embedded

HERE = Path("adapter_model.safetensors")


def test_round_trip() -> None:
    embedded = Embedded(
        {"r": 2}, {"task": "ü"}, {"m": [["up", [3, 4, 2], False]]}, {"wte": ["embedding", 8, 11]}
    )
    metadata = embedded.metadata()
    assert metadata["format"] == "pt"  # what transformers and PEFT look for
    assert parse_embedded(HERE, metadata) == embedded


def test_files_of_others_have_none() -> None:
    assert parse_embedded(HERE, {"format": "pt"}) is None


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"config": {}, "later": 1}', "{}"])
def test_metadata_that_is_not_ours(text: str) -> None:
    with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors has metadata"):
        parse_embedded(HERE, {"lorakit": text})


@pytest.mark.parametrize("info", [{"x": object()}, {"x": float("nan")}, {"x": {1, 2}}])
def test_info_must_be_json(info: dict[str, object]) -> None:
    with pytest.raises(AdapterFileError, match="plain JSON"):
        Embedded({}, info).metadata()


def test_no_sound_file_means_none(tmp_path: Path) -> None:
    assert embedded_in(tmp_path / "none") is None
    (tmp_path / "cut").write_bytes(b"123")
    assert embedded_in(tmp_path / "cut") is None
