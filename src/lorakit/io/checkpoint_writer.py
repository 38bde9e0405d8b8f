"""Writing a checkpoint a tensor at a time: safetensors files, and an index where there are several."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lorakit.errors import AdapterFileError
from lorakit.io.publish import DISK
from lorakit.io.safetensors_file import header

INDEX = "model.safetensors.index.json"
_ONLY = "model.safetensors"
Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_checkpoint(
    folder: Path, files: Mapping[str, Tensors], pieces: Callable[[str], Iterable[Any]]
) -> int:
    """Write the files of a checkpoint into a folder, forced to disk; what a header says is known before the first byte.

    Unless everything is in ``model.safetensors``, an index tells which file holds what.

    Args:
        folder: Where.
        files: File name to what it holds: tensor name to dtype and size.
        pieces: The bytes of a tensor, by its name; asked for once each, in the order of the file.

    Returns:
        The bytes of all tensors.

    Raises:
        AdapterFileError: The disk is full or fails, or a dtype has no word in the format.
    """
    total = 0
    for name, tensors in files.items():
        first, order = header(tensors, {"format": "pt"})
        _write(folder / name, _file(first, order, pieces))
        total += sum(math.prod(size) * dtype.itemsize for dtype, size in tensors.values())
    if list(files) != [_ONLY]:
        held = {tensor: name for name, tensors in files.items() for tensor in tensors}
        value = {"metadata": {"total_size": total}, "weight_map": dict(sorted(held.items()))}
        _write(folder / INDEX, [(json.dumps(value, indent=2) + "\n").encode()])
    return total


def shards(tensors: Tensors, most: int) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Tensors shared out over files of at most so many bytes, in their order; a larger one gets a file of its own."""
    groups: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, (dtype, size) in tensors.items():
        needed = math.prod(size) * dtype.itemsize
        if groups[-1] and filled + needed > most:
            groups.append({})
            filled = 0
        groups[-1][name] = dtype, size
        filled += needed
    if len(groups) == 1:
        return {_ONLY: groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, 1)}


def _file(first: bytes, order: list[str], pieces: Callable[[str], Iterable[Any]]) -> Iterator[Any]:
    yield first
    for tensor in order:
        yield from pieces(tensor)


def _write(path: Path, chunks: Iterable[Any]) -> None:
    try:
        DISK.write(path, chunks)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be written: {error.strerror or error}.") from error
