"""``lorakit export``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.errors import MergeError
from lorakit.models import load_model
from tests.cli.conftest import Lorakit, Trained


def test_a_run_is_merged_into_the_base_that_it_names(
    lorakit: Lorakit, trained: Trained, tmp_path: Path
) -> None:
    outcome = lorakit("export", trained.adapter.parent, "--to", "merged", "--out", tmp_path / "m", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["rounding"] < 1e-3
    assert not list((tmp_path / "m").glob("adapter*"))
    merged = load_model(tmp_path / "m")
    beside = load_model(trained.model)
    lk.load(beside, trained.adapter)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, beside(input_ids=ids).logits, atol=1e-3)
        lk.set_active(beside, None)
        assert not torch.allclose(merged(input_ids=ids).logits, beside(input_ids=ids).logits, atol=1e-1)


def test_what_has_no_place_in_the_checkpoint_is_merged_with_the_model_loaded(
    lorakit: Lorakit, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lorakit.models.streaming_merge as streaming

    def refuse(*args: object, **given: object) -> None:
        raise MergeError("not without the model")

    monkeypatch.setattr(streaming, "merge_checkpoint", refuse)
    outcome = lorakit("export", trained.adapter.parent, "--to", "merged", "--out", tmp_path / "m", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["difference"] < 1e-3


def test_an_adapter_is_converted(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    outcome = lorakit("export", trained.adapter, "--to", "native", "--out", tmp_path / "n")
    assert outcome.code == 0, outcome.err
    one, other = lk.read(trained.adapter), lk.read(tmp_path / "n")
    assert one.spec.shapes == other.spec.shapes
    assert all(
        (tensor == other.tensors[path][name]).all()
        for path, group in one.tensors.items()
        for name, tensor in group.items()
    )


def test_to_llama_cpp_with_the_facts_of_the_base(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    outcome = lorakit("export", trained.adapter.parent, "--to", "gguf", "--out", tmp_path / "a.gguf")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "a.gguf").read_bytes().startswith(b"GGUF")


def test_mistakes(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    run = trained.adapter.parent
    assert "Did you mean 'merged'" in lorakit("export", run, "--to", "merge").err
    assert "holds no best/" in lorakit("export", run, "--to", "native", "--which", "best").err
    assert "no run's folder" in lorakit("export", trained.adapter, "--to", "peft", "--which", "best").err
    assert lorakit("export", run, "--to", "native", "--which", "worst").code == 2
