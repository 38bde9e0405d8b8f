"""``lorakit merge``."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.cli.conftest import Lorakit, Trained
from tests.tiny_chat import colour_rows


def test_a_merged_model_answers_without_its_adapter(
    lorakit: Lorakit, trained: Trained, tmp_path: Path
) -> None:
    outcome = lorakit("merge", trained.model, trained.adapter, "--out", tmp_path / "merged")
    assert outcome.code == 0
    assert "largest difference of an output" in outcome.out
    answer = lorakit("generate", tmp_path / "merged", "-p", colour_rows(1)[0]["prompt"], "-n", 8)
    assert answer.out == "red\n"


def test_json_and_weights(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    outcome = lorakit("merge", trained.model, trained.adapter, "-o", tmp_path / "m", "-w", 0.5, "--json")
    result = json.loads(outcome.out)
    assert result["folder"] == str(tmp_path / "m")
    assert result["saved_difference"] < 1e-3 * result["largest_logit"]


def test_mistakes(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    assert "--overwrite" in lorakit("merge", trained.model, trained.adapter, "--out", trained.model).err
    assert (
        "2 weights"
        in lorakit("merge", trained.model, trained.adapter, "-o", tmp_path / "m", "-w", 1, "-w", 2).err
    )
    assert "There is no adapter" in lorakit("merge", trained.model, tmp_path / "x", "-o", tmp_path / "m").err
    assert not (tmp_path / "m").exists()


def test_without_loading_the_model(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    loaded = lorakit("merge", trained.model, trained.adapter, "--out", tmp_path / "loaded")
    assert loaded.code == 0
    outcome = lorakit(
        "merge", "--base", trained.model, "--adapter", trained.adapter, "--out", tmp_path / "merged"
    )
    assert outcome.code == 0
    assert "rounding took, beside a merge in float64" in outcome.out
    answer = lorakit("generate", tmp_path / "merged", "-p", colour_rows(1)[0]["prompt"], "-n", 8)
    assert answer.out == "red\n"
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("loaded", "merged"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(other[name], value), name


def test_the_error_as_json(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    outcome = lorakit(
        "merge", "--base", trained.model, "-a", trained.adapter, "-w", 0.5, "-o", tmp_path / "m",
        "--dtype", "bfloat16", "--json",
    )  # fmt: skip
    result = json.loads(outcome.out)
    assert 0 < result["relative_error"] < 1
    assert result["copied"] > 0
    assert all(found["error"] < found["change"] for found in result["tensors"].values())
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}


def test_which_way_must_be_said(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "m")
    base, adapter = ("--base", trained.model), ("--adapter", trained.adapter)
    assert "--out" in lorakit("merge", *base, *adapter).err
    assert "both" in lorakit("merge", trained.model, trained.adapter, *base, *out).err
    assert "Name a base and an adapter" in lorakit("merge", *out).err
    assert "Name a base and an adapter" in lorakit("merge", trained.model, *adapter, *out).err
    assert "at least one adapter" in lorakit("merge", *base, *out).err
    assert "There is no task 'x'" in lorakit("merge", *base, *adapter, "--task", "x", *out).err
    assert not (tmp_path / "m").exists()
