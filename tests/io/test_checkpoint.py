"""Reading a checkpoint one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakit.errors import AdapterFileError
from lorakit.io.checkpoint import Checkpoint

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.ones(5).bfloat16(),
}


def sharded(folder: Path) -> Path:
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({k: TENSORS[k] for k in ("b", "c")}, folder / "two.safetensors")
    names = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_one_file_and_shards_give_the_tensors(tmp_path: Path) -> None:
    (tmp_path / "single").mkdir()
    save_file(TENSORS, tmp_path / "single" / "model.safetensors")
    (tmp_path / "single" / "config.json").write_text('{"model_type": "gpt2"}')
    for path in (sharded(tmp_path), tmp_path / "single", tmp_path / "single" / "model.safetensors"):
        found = Checkpoint(path)
        assert set(found) == set(TENSORS)
        assert len(found) == 3
        for name, tensor in TENSORS.items():
            assert found.shape(name) == tuple(tensor.shape)
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert Checkpoint(tmp_path / "single").config == {"model_type": "gpt2"}


def test_damage_is_told(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="There is no checkpoint"):
        Checkpoint(tmp_path / "x")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(AdapterFileError, match=r"no .safetensors file. It has pytorch_model.bin"):
        Checkpoint(tmp_path)
    sharded(tmp_path)
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(AdapterFileError, match=r"lacks shards .*: one.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "one.safetensors").write_bytes((tmp_path / "two.safetensors").read_bytes())
    with pytest.raises(AdapterFileError, match=r"'[bc]' is in one.safetensors and two.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "one.safetensors").write_bytes(b"\xff" * 30)
    with pytest.raises(AdapterFileError, match="damaged"):
        Checkpoint(tmp_path)


def test_an_index_of_other_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["elsewhere"] = "one.safetensors"
    index.write_text(json.dumps(value))
    with pytest.raises(AdapterFileError, match="the index names elsewhere, and no shard holds it"):
        Checkpoint(tmp_path)
