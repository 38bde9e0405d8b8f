"""A model's checkpoint as a mapping from names to tensors that are read one at a time.

A folder with ``model.safetensors``, a sharded one with its index, or a single file. Only the headers are in memory: a
tensor is read when it is asked for, and given back to the caller alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lorakit.errors import AdapterFileError, listing
from lorakit.io.safetensors_file import Entry, damaged, memory_of, read_header

_INDEX = ".safetensors.index.json"
_PIECE_BYTES = 2**22


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint, by name, read from the disk when they are asked for.

    Attributes:
        path: The folder or file.
        config: What ``config.json`` beside it says; empty without one.

    Raises:
        AdapterFileError: There is no checkpoint, a shard is missing or damaged, or two shards hold the same name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._entries: dict[str, tuple[Path, int, Entry]] = {}
        files, named = _files(self.path)
        for file in files:
            start, entries = read_header(file)
            for name, entry in entries.items():
                if name in self._entries:
                    raise AdapterFileError(
                        f"{self.path}: {name!r} is in {self._entries[name][0].name} and {file.name}."
                    )
                self._entries[name] = file, start, entry
        if unknown := [name for name in named if name not in self._entries]:
            raise AdapterFileError(
                f"{self.path}: the index names {listing(unknown, most=4)}, and no shard holds "
                f"{'it' if len(unknown) == 1 else 'them'}: it belongs to other shards."
            )
        folder = self.path if self.path.is_dir() else self.path.parent
        self.config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}

    def __getitem__(self, name: str) -> Tensor:
        file, start, (dtype, shape, begin, end) = self._entries[name]
        data = torch.empty(end - begin, dtype=torch.uint8)
        with file.open("rb") as opened:
            opened.seek(start + begin)
            if len(data) and opened.readinto(memory_of(data)) != len(data):
                raise damaged(file, f"it ended while {name!r} was being read")
        return data.view(dtype).view(shape)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor as the file holds them, a few megabytes at a time."""
        file, start, (_, _, begin, end) = self._entries[name]
        with file.open("rb") as opened:
            opened.seek(start + begin)
            left = end - begin
            while left:
                piece = opened.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise damaged(file, f"it ended while {name!r} was being read")
                left -= len(piece)
                yield piece

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The size of a tensor, from the header alone."""
        return self._entries[name][2][1]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, from the header alone."""
        return self._entries[name][2][0]

    def file(self, name: str) -> str:
        """The name of the file that a tensor is in."""
        return self._entries[name][0].name


def _files(path: Path) -> tuple[list[Path], Collection[str]]:
    """The files of a checkpoint, and the names of tensors that they must hold by its index."""
    if path.is_file():
        return [path], ()
    if not path.is_dir():
        raise AdapterFileError(f"There is no checkpoint at {path}: no such file or folder.")
    indices = sorted(path.glob(f"*{_INDEX}"))
    single = path / "model.safetensors"
    if indices and not single.is_file():
        named = _json(indices[0]).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(v, str) for v in named.values()):
            raise AdapterFileError(f"{indices[0]} has no weight_map from names to files.")
        files = [path / Path(name).name for name in dict.fromkeys(named.values())]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise AdapterFileError(f"{path} lacks shards that {indices[0].name} names: {listing(missing)}.")
        return files, named
    found = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if not found:
        pickles = [p.name for p in (*path.glob("*.bin"), *path.glob("*.pt"))]
        hint = f" It has {listing(pickles)}: save it as safetensors first." if pickles else ""
        raise AdapterFileError(f"{path} holds no .safetensors file.{hint}")
    return found, ()


def _json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{path} does not hold a JSON object.")
    return value
