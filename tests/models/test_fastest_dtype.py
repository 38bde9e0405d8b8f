"""The dtype that a machine multiplies fastest is measured once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lorakit.models.fastest_dtype as module
from lorakit.models.fastest_dtype import MatmulRates, fastest_dtype, matmul_rates
from lorakit.models.load import compute_dtype


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    return tmp_path / "matmul_rates.json"


def test_bfloat16_must_be_clearly_faster() -> None:
    assert MatmulRates(100.0, 150.0).fastest is torch.bfloat16
    assert MatmulRates(100.0, 110.0).fastest is torch.float32
    assert MatmulRates(100.0, 9.0).fastest is torch.float32
    assert MatmulRates(100.0, 0.0).fastest is torch.float32


def test_it_is_measured_once_and_again_if_asked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def rate(dtype: torch.dtype, device: torch.device) -> float:
        measured.append(dtype)
        return 3.0 if dtype is torch.bfloat16 else 2.0

    monkeypatch.setattr(module, "_rate", rate)
    assert matmul_rates() == MatmulRates(2.0, 3.0)
    assert matmul_rates() == MatmulRates(2.0, 3.0)
    assert measured == [torch.float32, torch.bfloat16]
    matmul_rates(again=True)
    assert len(measured) == 4
    (entry,) = json.loads(cache.read_text(encoding="utf-8")).values()
    assert entry == {"float32": 2.0, "bfloat16": 3.0}
    assert fastest_dtype() is torch.bfloat16
    assert compute_dtype("fastest", torch.device("cpu")) is torch.bfloat16
    assert compute_dtype("auto", torch.device("cpu")) is torch.float32


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}'])
def test_a_damaged_cache_is_measured_over(cache: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    cache.write_text(content, encoding="utf-8")
    monkeypatch.setattr(module, "_rate", lambda dtype, device: 1.0)
    assert matmul_rates() == MatmulRates(1.0, 1.0)


def test_a_real_measurement_is_plausible(cache: Path) -> None:
    rates = matmul_rates()
    assert 1e8 < rates.float32 < 1e14
    assert 0 <= rates.bfloat16 < 1e14
