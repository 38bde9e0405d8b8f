"""Which settings follow from what a machine can do."""

from __future__ import annotations

import pytest

from lorakit.models.fastest_dtype import MatmulRates
from lorakit.train.doctor import advice


@pytest.mark.parametrize(
    ("rates", "threads", "kernels", "gpu", "told", "not_told"),
    [
        (
            MatmulRates(50e9, 5e9),
            8,
            "compiled",
            False,
            "auto is float32, which is right here",
            "OMP_NUM_THREADS",
        ),
        (MatmulRates(50e9, 150e9), 8, "compiled", False, "3.0 times as fast", "kernels build"),
        (MatmulRates(50e9, 5e9), 2, "compiled", False, "torch uses 2 of 8 cores", "kernels build"),
        (MatmulRates(50e9, 5e9), 8, "not built", False, "lorakit kernels build", "OMP_NUM_THREADS"),
        (MatmulRates(50e9, 5e9), 8, "compiled", True, "model.device: cuda", "float32, which is right"),
        (MatmulRates(50e9, 0.0), 8, "compiled", False, "0.00 times", "model.dtype: fastest"),
    ],
)
def test_advice(rates: MatmulRates, threads: int, kernels: str, gpu: bool, told: str, not_told: str) -> None:
    lines = " ".join(advice({"cpu": rates}, 8, threads, kernels, gpu))
    assert told in lines
    assert not_told not in lines
