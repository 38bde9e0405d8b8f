"""``lorakit inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit as lk
from tests.cli.conftest import Lorakit, Trained


def test_table(lorakit: Lorakit, trained: Trained) -> None:
    outcome = lorakit("inspect", trained.adapter)
    assert outcome.code == 0
    for word in (
        "q_proj",
        "down_proj",
        "lora",
        "float32",
        "eff. rank",
        f"{lk.read(trained.adapter).numel:,}",
    ):
        assert word in outcome.out


def test_numbers(lorakit: Lorakit, tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5), "norm": nn.LayerNorm(5)})
    lk.attach(
        model, {"a": lk.LoRA(r=2, alpha=3), "b": lk.LoRA(r=2, alpha=3), "norm": lk.FullFineTuning()}, seed=0
    )
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    state = lk.extract(model)
    lk.save(model, tmp_path / "adapter")
    result = json.loads(lorakit("inspect", tmp_path / "adapter", "--json").out)
    assert result["parameters"] == state.numel
    assert result["bytes"] == 4 * state.numel
    assert result["not_finite"] == []
    groups = {group["target"]: group for group in result["groups"]}
    dense = 1.5 * state.tensors["a"]["lora_B"] @ state.tensors["a"]["lora_A"]
    assert groups["a"] == {
        **groups["a"],
        "method": "lora",
        "size": "5 x 6",
        "sites": 1,
        "r": 2,
        "alpha": 3,
        "scale": 1.5,
        "parameters": 22,
        "bytes": 88,
        "dtype": "float32",
        "norm": pytest.approx(dense.norm().item(), rel=1e-5),
        "top": pytest.approx(torch.linalg.matrix_norm(dense, 2).item(), rel=1e-5),
    }
    assert 1 < groups["a"]["effective_rank"] <= 2
    full = [group for group in result["groups"] if group["method"] == "full"]
    assert full
    assert all(group["r"] is None and group["norm"] is None for group in full)


def test_not_a_number_is_pointed_out(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    state = lk.read(trained.adapter)
    path = next(iter(state.tensors))
    broken = {p: dict(group) for p, group in state.tensors.items()}
    broken[path]["lora_A"] = broken[path]["lora_A"].clone()
    broken[path]["lora_A"][0, 0] = float("nan")
    lk.save(lk.AdapterState(state.spec, broken), tmp_path / "broken")
    outcome = lorakit("inspect", tmp_path / "broken")
    assert "1 tensors hold a NaN" in outcome.out
    assert json.loads(lorakit("inspect", tmp_path / "broken", "--json").out)["not_finite"] == [
        f"{path}:lora_A"
    ]


def test_mistakes(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    assert "There is no adapter" in lorakit("inspect", tmp_path / "x").err
    assert "holds no adapter" in lorakit("inspect", trained.model).err
