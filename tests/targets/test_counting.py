"""Counting a base: matrices count whole, whatever holds them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.targets.counting import base_bytes, base_numel


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8, bias=False))
    made.register_buffer("table", torch.zeros(5, dtype=torch.int16))
    return made


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_a_quantised_weight_counts_by_its_matrix(storage: str) -> None:
    base = model()
    numbers = sum(p.numel() for p in base.parameters())
    assert base_numel(base) == numbers
    assert base_bytes(base) == 4 * numbers + 10
    report = lk.quantize(base, storage)
    assert base_numel(base) == numbers
    assert base_bytes(base) == 4 * (numbers - report.parameters) + 10 + report.bytes_after
    attached = lk.attach(base, lk.LoRA(r=2))
    assert attached.base_parameters == numbers
    assert base_numel(base) == numbers, "adapters are not the base"


def test_tied_weights_count_once() -> None:
    base = model()
    base.add_module("again", nn.Linear(32, 8, bias=False))
    base.again.weight = base[2].weight
    assert base_numel(base) == base_numel(model())
    assert base_bytes(base) == base_bytes(model())


def test_a_weight_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    assert layer.weight.numel() == 64 * 32 // 2
    assert base_numel(nn.Sequential(layer)) == 64 * 32
