"""Find and load the compiled products. Nothing is ever built here, and nothing is looked for before the first use.

The library lies in the user's cache, in a folder named after everything that it depends on: its source, the build of
torch, the interpreter, the processor. So a library that does not fit is never found, and one that fits is found by
every environment that could have made it. It is loaded only if its content is what the build wrote down.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.errors import ConfigError, KernelError

SWITCH = "LORAKIT_KERNELS"
LIBRARY, RECORD = "low_rank.so", "build.json"
_SOURCE = Path(__file__).parent
# `build.py` belongs to what a library is made of: it holds the compiler's flags.
MADE_OF = (
    "products.h",
    "vectors.h",
    "products.cpp",
    "on_tensors.h",
    "low_rank.cpp",
    "layer.h",
    "layer.cpp",
    "lookup.h",
    "lookup.cpp",
    "nf4.h",
    "nf4.cpp",
    "tiles.h",
    "attention.h",
    "training.h",
    "training.cpp",
    "decoder.h",
    "team.h",
    "patches.h",
    "decoder.cpp",
    "build.py",
)

Product = Callable[[Tensor, Tensor, Tensor, Tensor, float], "Tensor | None"]
"""``y += scale * x Aᵀ Bᵀ`` for ``(y, x, A, B, scale)``: returns ``y``, or None and does nothing."""

Lookup = Callable[[Tensor, Tensor, Tensor, Tensor, float, int], "Tensor | None"]
"""``y += scale * Aᵀ[ids] Bᵀ`` for ``(y, ids, A, B, scale, padding)``: returns ``y``, or None and does nothing."""

Layer = Callable[[nn.Module, Tensor, Tensor], "Tensor | None"]
"""The product in its usual case, for ``(layer, x, y)``: returns ``y``, or None and does nothing."""

Decode = Callable[[Tensor, Tensor, Tensor, int, int], "Tensor | None"]
"""Write NF4 values for ``(codes, absmax, out, first, block)``: returns ``out``, or None and does nothing."""


class Library(NamedTuple):
    """What a library holds."""

    product: Product
    layer: Layer
    lookup: Lookup
    decode_nf4: Decode


@dataclass(frozen=True)
class Status:
    """Which way the low-rank product of the CPU goes, and the decoding of NF4.

    Attributes:
        state: ``"compiled"``; or through torch's operations: ``"off"``, ``"not built"`` or ``"unusable"``.
        reason: Why, for a person; empty when it is compiled.
        folder: Where the library is, or would be.
    """

    state: Literal["compiled", "off", "not built", "unusable"]
    reason: str
    folder: Path

    def __str__(self) -> str:
        return self.state if not self.reason else f"{self.state} ({self.reason})"


def status() -> Status:
    """Which way is taken here; this looks for the library if that was not done yet.

    Raises:
        ConfigError: ``LORAKIT_KERNELS`` has a value that means nothing.
    """
    return _resolved()


def forget() -> None:
    """Look again at the next use: after a build, or when the environment has changed."""
    global product, layer, lookup, decode_nf4, _status
    with _resolving:
        product, lookup, decode_nf4 = _look_first, _look_first_for_lookup, _look_first_for_nf4
        layer, _status = None, None


def kernel_folder() -> Path:
    """Where the library for this source, torch, interpreter and processor belongs."""
    from lorakit.cache import cache_folder

    facts = [torch.__version__, torch.version.git_version, str(torch.version.cuda), EXTENSION_SUFFIXES[0]]
    digest = hashlib.sha256("\n".join([*facts, platform.machine(), processor()]).encode())
    for name in MADE_OF:
        digest.update((_SOURCE / name).read_bytes())
    return cache_folder() / "kernels" / digest.hexdigest()[:16]


def processor() -> str:
    """What this processor can do, as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next((line for line in file if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        return platform.processor()


def read_library(folder: Path) -> Library:
    """Load the library of a folder.

    Raises:
        KernelError: It is damaged or cannot be loaded.
    """
    path = folder / LIBRARY
    try:
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))["sha256"]
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KernelError(f"{path} cannot be read: {error}") from error
    if found != recorded:  # the system would load half a library, and the process might die of it
        raise KernelError(f"{path} is damaged")
    loader = ExtensionFileLoader("lorakit_low_rank", str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    try:
        module = module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise KernelError(f"{path} cannot be loaded: {error}") from error
    return Library(module.add_low_rank, module.add_in_layer, module.add_lookup, module.decode_nf4)


# ---- the products in use ---------------------------------------------------------------------------------------------
def _look_first(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor | None:
    """What stands for the product until one is wanted on a CPU: it looks, and takes its own place."""
    if not y.is_cpu:
        return None
    _resolved()
    return None if product is None else product(y, x, A, B, scale)


def _look_first_for_lookup(
    y: Tensor, ids: Tensor, A: Tensor, B: Tensor, scale: float, padding: int
) -> Tensor | None:
    """The same for an embedding."""
    if not y.is_cpu:
        return None
    _resolved()
    return None if lookup is None else lookup(y, ids, A, B, scale, padding)


def _look_first_for_nf4(codes: Tensor, absmax: Tensor, out: Tensor, first: int, block: int) -> Tensor | None:
    """The same for the decoding of NF4."""
    if not out.is_cpu:
        return None
    _resolved()
    return None if decode_nf4 is None else decode_nf4(codes, absmax, out, first, block)


product: Product | None = _look_first
"""The compiled product, or None when there is none to use."""

layer: Layer | None = None
"""The compiled way of a layer's hook, or None; a layer's first product looks for it, which goes another way."""

lookup: Lookup | None = _look_first_for_lookup
"""The compiled product for an embedding, or None."""

decode_nf4: Decode | None = _look_first_for_nf4
"""The compiled decoding of NF4, or None."""

_status: Status | None = None
_resolving = threading.Lock()


def _resolved() -> Status:
    global product, layer, lookup, decode_nf4, _status
    with _resolving:
        if _status is None:
            found, library = _look()
            product, layer, lookup, decode_nf4 = library or (None, None, None, None)
            _status = found
        return _status


def _look() -> tuple[Status, Library | None]:
    folder = kernel_folder()
    switch = os.environ.get(SWITCH, "on").lower()
    if switch not in ("on", "off"):
        raise ConfigError(f"{SWITCH}={switch!r} means nothing. Use 'off', or 'on', which is the default.")
    if switch == "off":
        return Status("off", f"{SWITCH}=off", folder), None
    if not folder.exists():
        return Status("not built", "run: lorakit kernels build", folder), None
    try:
        compiled = read_library(folder)
    except KernelError as error:
        reason = f"{error}; run: lorakit kernels build"
        warnings.warn(f"The compiled low-rank product is not used: {reason}", RuntimeWarning, stacklevel=2)
        return Status("unusable", reason, folder), None
    return Status("compiled", "", folder), compiled
