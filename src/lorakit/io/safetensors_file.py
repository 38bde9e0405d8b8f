"""Reading and writing ``.safetensors`` files, with the header checked before a single byte of it is believed.

The file is read once, into one buffer that the tensors share: what was checked is what is used, and a file that
is replaced later (PEFT writes in place) cannot change tensors that were read. The safetensors library maps the
file instead, and takes longer for many small tensors.

Layout: 8 bytes, the length of the header (little-endian); the header, JSON, padded with blanks; the data.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import AdapterFileError, listing
from lorakit.ops.native.pages import room

MOST_HEADER_BYTES = 100_000_000  # the limit of the format's own library
_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {code: getattr(torch, n) for code, n in _NAMES.items() if hasattr(torch, n)}
CODES = {dtype: code for code, dtype in DTYPES.items()}

_FACTS = {"dtype", "shape", "data_offsets"}

Entry = tuple[torch.dtype, tuple[int, ...], int, int]


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and its metadata.

    Raises:
        AdapterFileError: The file is damaged; the message says what is wrong with it.
        MemoryError: There is not enough memory for it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(8), size)
            entries, metadata = parse_header(path, file.read(length), size - 8 - length)
            data = _room(path, size - 8 - length)
            if data.numel() and file.readinto(memory_of(data)) != data.numel():
                raise damaged(path, "it ended while it was being read")
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    numbers: dict[torch.dtype, Tensor] = {}  # all of the data as numbers of a dtype
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        size = dtype.itemsize
        if begin % size:  # legal in the format, but a view must be aligned
            tensors[name] = data[begin:end].clone().view(dtype).view(shape)
            continue
        if dtype not in numbers:
            numbers[dtype] = data[: data.numel() // size * size].view(dtype)
        tensors[name] = numbers[dtype][begin // size : end // size].view(shape)
    return tensors, metadata


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata alone; the header is checked, the data is not read.

    Raises:
        AdapterFileError: The file is damaged.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = _header_length(path, file.read(8), size)
        return parse_header(path, file.read(length), size - 8 - length)[1]


def read_header(path: Path) -> tuple[int, dict[str, Entry]]:
    """Where the data of a file begins, and its tensors; the header is checked, the data is not read.

    Raises:
        AdapterFileError: The file is damaged or cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(8), size)
            return 8 + length, parse_header(path, file.read(length), size - 8 - length)[0]
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror or error}.") from error


def parse_header(path: Path, text: bytes, data_bytes: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensor name to ``(dtype, shape, begin, end)``, and the metadata.

    Checked: JSON without repeated names; known dtypes; sizes that fit shapes; data that starts at 0, has neither
    gaps nor overlaps, and ends with the file.

    Raises:
        AdapterFileError: A check failed.
    """
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise damaged(path, f"its header is not JSON ({error})") from None
    except _RepeatedNameError as error:
        raise damaged(path, f"its header names {error.args[0]!r} twice") from None
    if not isinstance(header, dict):
        raise damaged(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "its metadata is not a mapping of strings")
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    at = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != at:
            what = (
                "overlaps the tensor before it"
                if begin < at
                else f"leaves {begin - at} bytes unused before it"
            )
            raise damaged(path, f"tensor {name!r} {what}")
        if end > data_bytes:
            raise damaged(
                path, f"it is cut off: tensor {name!r} ends {end - data_bytes} bytes after the file does"
            )
        at = end
    if at != data_bytes:
        raise damaged(path, f"{data_bytes - at} bytes at its end belong to no tensor")
    return entries, metadata


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[Any]:
    """The bytes of a file, piece by piece: the header, then each tensor's memory, nothing copied that need not be.

    Equal input gives equal bytes.
    """
    first, names = header({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, metadata)
    yield first
    for name in names:
        yield from pieces_of(tensors[name])


def header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """How a file begins, and the order in which the tensors follow: by size of dtype and then by name.

    So each is aligned, and what a file holds decides its bytes.

    Args:
        tensors: Name to dtype and size.
        metadata: What else the header says.

    Raises:
        AdapterFileError: A dtype that the format has no word for.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in names:
        dtype, shape = tensors[name]
        if dtype not in CODES:
            raise AdapterFileError(
                f"Tensor {name!r} has dtype {dtype}, which a .safetensors file cannot hold."
            )
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names


def pieces_of(tensor: Tensor) -> Iterator[Any]:
    """The bytes of a tensor, as a file holds them."""
    if tensor.numel():
        kept = tensor.detach().cpu().contiguous()  # alive for as long as its memory is in use
        yield memory_of(kept)


def damaged(path: Path, why: str) -> AdapterFileError:
    """The error for a file that is not what it should be."""
    return AdapterFileError(f"{path} is damaged: {why}. Copy or download it again.")


def _room(path: Path, size: int) -> Tensor:
    """Memory for the data of a file, in large pages where that is worth it: a server reads it with every token."""
    try:
        return room(size)
    except (RuntimeError, OSError) as error:  # as torch and the system say that there is none
        raise MemoryError(f"There is not enough memory for the {size} bytes of {path}.") from error


def _header_length(path: Path, first: bytes, size: int) -> int:
    if len(first) < 8:
        raise damaged(path, f"it has {size} bytes, too few for a .safetensors file")
    length = int.from_bytes(first, "little")
    if length > MOST_HEADER_BYTES or length > size - 8:
        if first.startswith((b"version ", b"<!DOCTYP", b"<html")):
            raise AdapterFileError(
                f"{path} is not a .safetensors file but text: a Git LFS pointer or a web page. Download the "
                "file itself."
            )
        raise damaged(path, f"its header is said to be {length} bytes long, but the file has {size} bytes")
    if length < 2:
        raise damaged(path, "it has no header")
    return length


def _entry(path: Path, name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != _FACTS:
        raise damaged(path, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise damaged(
            path, f"tensor {name!r} has the unknown dtype {code!r} (known: {listing(DTYPES, most=20)})"
        )
    if not (_is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2):
        raise damaged(path, f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise damaged(
            path,
            f"tensor {name!r} of shape {shape} and dtype {code} needs {math.prod(shape) * dtype.itemsize} "
            f"bytes, not {end - begin}",
        )
    return dtype, tuple(shape), begin, end


def _is_sizes(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for n in value:  # noqa: SIM110 - asked twice for each tensor, and `all` takes twice as long
        if type(n) is not int or not 0 <= n < 2**63:
            return False
    return True


class _RepeatedNameError(Exception):
    pass


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _RepeatedNameError(name)
            seen.add(name)
    return unique


def memory_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's own memory, as bytes."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
