"""Which dtype a machine multiplies fastest, measured once and kept in the user's cache.

Whether bfloat16 is faster than float32 cannot be told from the names of processors: with AVX2 alone it is emulated and
an order of magnitude slower, with AMX or AVX-512 BF16 it is several times faster.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit.cache import cache_folder

_SIZE = 1024  # of the square matrices: as wide as the layers of a small model, 2 GFLOP a product
_ROWS = 256
_WORTH = 1.2  # half precision rounds: it has to be faster by more than the noise of a shared machine


@dataclass(frozen=True)
class MatmulRates:
    """Measured rates of matrix products, in FLOP a second.

    Attributes:
        float32: Of float32.
        bfloat16: Of bfloat16; 0 where torch cannot multiply it here.
    """

    float32: float
    bfloat16: float

    @property
    def fastest(self) -> torch.dtype:
        """bfloat16 if it is faster by a fifth at least, else float32."""
        return torch.bfloat16 if self.bfloat16 > _WORTH * self.float32 else torch.float32


def fastest_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype to compute in: bfloat16 where the hardware multiplies it faster than float32, else float32."""
    return matmul_rates(device).fastest


def matmul_rates(device: torch.device | str = "cpu", *, again: bool = False) -> MatmulRates:
    """The rates of a device, from the cache or measured (some tenths of a second).

    Args:
        device: Where to multiply.
        again: Measure even if the cache knows.
    """
    device = torch.device(device)
    path = cache_folder() / "matmul_rates.json"
    key = _key(device)
    known = _read(path)
    if not again and key in known:
        with contextlib.suppress(TypeError):
            return MatmulRates(**known[key])
    rates = MatmulRates(_rate(torch.float32, device), _rate(torch.bfloat16, device))
    with contextlib.suppress(OSError):  # without a cache it is measured each time
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(json.dumps({**known, key: vars(rates)}, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
    return rates


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """The best of a few products: what disturbs a measurement only ever makes it slower."""
    try:
        with torch.no_grad():
            x = torch.randn(_ROWS, _SIZE, device=device).to(dtype)
            weight = torch.randn(_SIZE, _SIZE, device=device).to(dtype)
            x @ weight.T  # the first product also sets the kernel up
            seconds = min(_seconds(x, weight, device) for _ in range(15))
    except RuntimeError:
        return 0.0
    return 2 * _ROWS * _SIZE * _SIZE / seconds


def _seconds(x: torch.Tensor, weight: torch.Tensor, device: torch.device) -> float:
    began = time.perf_counter()
    x @ weight.T
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - began, 1e-9)


def _key(device: torch.device) -> str:
    """What the rates depend on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return (
        f"{platform.node()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
