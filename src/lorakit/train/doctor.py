"""What a machine can do for training, and which settings follow from it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.cache import cache_folder
from lorakit.models.fastest_dtype import MatmulRates, matmul_rates
from lorakit.ops.native.load import status
from lorakit.train.free_space import free_disk, memory
from lorakit.train.run_files import machine, version_of, versions

LIBRARIES: Mapping[str, str] = {
    "peft": "",
    "gguf": "lorakit export --to gguf, and the built-in models",
    "bitsandbytes": "models that are quantised by it",
    "sacrebleu": "the metric bleu",
    "matplotlib": "the picture of the loss",
    "datasets": "data from the hub",
    "pyarrow": "data in parquet files",
    "tensorboard": "train.report_to: [tensorboard]",
    "trackio": "train.report_to: [trackio]",
    "wandb": "train.report_to: [wandb]",
    "mlflow": "train.report_to: [mlflow]",
}
"""Optional libraries, and what each is for."""
_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
    "i8mm",
)


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        system: Operating system, Python, processor.
        cores: Cores that this process may use.
        threads: Threads that torch uses.
        isa: The instruction set that torch uses, and what the processor has of those that matter.
        memory: Bytes of main memory, and those that are free; 0 where the system does not tell.
        gpus: Name and bytes of memory of each.
        rates: Products a second in each dtype, by device.
        kernels: Whether lorakit's compiled product is in use.
        cache: lorakit's cache folder, and the free bytes of its disk.
        versions: Of what numbers depend on.
        libraries: Optional library to its version, or None where it is not installed.
        advice: Which settings to use here, and why.
    """

    system: Mapping[str, str]
    cores: int
    threads: int
    isa: tuple[str, tuple[str, ...]]
    memory: tuple[int, int]
    gpus: tuple[tuple[str, int], ...]
    rates: Mapping[str, MatmulRates]
    kernels: str
    cache: tuple[str, int]
    versions: Mapping[str, str]
    libraries: Mapping[str, str | None]
    advice: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            **asdict(self),
            "isa": {"torch": self.isa[0], "processor": list(self.isa[1])},
            "memory": {"bytes": self.memory[0], "free": self.memory[1]},
            "gpus": [{"name": name, "bytes": size} for name, size in self.gpus],
            "rates": {
                device: {"float32": rate.float32, "bfloat16": rate.bfloat16}
                for device, rate in self.rates.items()
            },
            "cache": {"folder": self.cache[0], "free": self.cache[1]},
            "advice": list(self.advice),
        }

    def sections(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Titles with names and values, for people."""
        flags = ", ".join(self.isa[1]) or "not told by this system"
        hardware = [
            *self.system.items(),
            ("cores", f"{self.cores}, of which torch uses {self.threads}"),
            ("instructions", f"torch uses {self.isa[0]}; the processor has {flags}"),
            ("memory", f"{_gigabytes(self.memory[0])}, {_gigabytes(self.memory[1])} free"),
            ("GPU", ", ".join(f"{name} ({_gigabytes(size)})" for name, size in self.gpus) or "none"),
        ]
        hardware += [(f"products on {device}", _speed(rate)) for device, rate in self.rates.items()]
        installed = [
            (name, found or f"not installed{f' (for {LIBRARIES[name]})' if LIBRARIES[name] else ''}")
            for name, found in self.libraries.items()
        ]
        software = [
            *self.versions.items(),
            ("kernels", self.kernels),
            ("cache", f"{self.cache[0]} ({_gigabytes(self.cache[1])} free on its disk)"),
        ]
        return [("Machine", hardware), ("Software", software), ("Optional libraries", installed)]


def examine(*, again: bool = False) -> Examination:
    """Look at this machine.

    Args:
        again: Measure the products anew.
    """
    facts = machine()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rates = {device: matmul_rates(device, again=again) for device in devices}
    gpus = tuple(
        (torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory)
        for i in range(torch.cuda.device_count())
    )
    cores, kernels = _cores(), status()
    place = cache_folder()
    return Examination(
        system={"system": str(facts["system"]), "processor": str(facts["processor"])},
        cores=cores,
        threads=torch.get_num_threads(),
        isa=(torch.backends.cpu.get_cpu_capability(), _flags()),
        memory=memory(),
        gpus=gpus,
        rates=rates,
        kernels=str(kernels),
        cache=(str(place), free_disk(place)),
        versions=versions(),
        libraries={name: version_of(name) for name in LIBRARIES},
        advice=tuple(advice(rates, cores, torch.get_num_threads(), kernels.state, bool(gpus))),
    )


def advice(
    rates: Mapping[str, MatmulRates], cores: int, threads: int, kernels: str, has_gpu: bool
) -> Sequence[str]:
    """Which settings follow.

    Args:
        rates: By device.
        cores: Cores that may be used.
        threads: Threads that torch uses.
        kernels: State of the compiled product, see `lorakit.ops.native.load.Status`.
        has_gpu: Whether there is a GPU.
    """
    lines = []
    cpu = rates["cpu"]
    factor = cpu.bfloat16 / cpu.float32 if cpu.float32 else 0.0
    if has_gpu:
        lines.append(
            "model.device: cuda is the default here; model.dtype: auto takes the checkpoint's own dtype."
        )
    elif cpu.fastest is torch.bfloat16:
        lines.append(
            f"model.dtype: auto is float32. bfloat16 is multiplied {factor:.1f} times as fast here and takes half the "
            "memory; it rounds to three digits. Try it with model.dtype: fastest, and compare the losses."
        )
    else:
        lines.append(
            f"model.dtype: auto is float32, which is right here: bfloat16 is multiplied {factor:.2f} times as fast."
        )
    if threads < cores:
        lines.append(
            f"torch uses {threads} of {cores} cores: unset OMP_NUM_THREADS, or set it to {cores}, if none is shared."
        )
    if kernels == "not built":
        lines.append("lorakit kernels build makes the low-rank product on the CPU faster (needs g++).")
    if not has_gpu:
        lines.append(
            "train.batching: auto packs rows where that is exact, and saves the padding; activation checkpointing only "
            "where lorakit estimate says that memory is short."
        )
    return lines


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _flags() -> tuple[str, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    has = next(
        (line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), []
    )
    return tuple(flag for flag in _FLAGS if flag in has)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size else "not told"


def _speed(rates: MatmulRates) -> str:
    half = f"{rates.bfloat16 / 1e9:,.0f} in bfloat16" if rates.bfloat16 else "none in bfloat16"
    return f"{rates.float32 / 1e9:,.0f} GFLOP/s in float32, {half}"
