"""From any format to any other: recognised by its keys, read strictly into an `AdapterState`, written whole."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lorakit.core.adapter import AdapterSpec, AdapterState
from lorakit.core.effort import shared_effort
from lorakit.errors import AdapterFileError, listing, near_matches
from lorakit.io.adapter_directory import CONFIG, WEIGHTS, Form, read, why_not_peft, write
from lorakit.io.formats.cloneofsimo import CLONEOFSIMO
from lorakit.io.formats.diffusers import DIFFUSERS, DIFFUSERS_OLD, DIFFUSERS_PROCESSORS
from lorakit.io.formats.format import Format, Hints
from lorakit.io.formats.gguf import GGUF, load_gguf, save_gguf
from lorakit.io.formats.kohya import KOHYA, LYCORIS
from lorakit.io.formats.loralib import LORALIB
from lorakit.io.formats.names import split_component
from lorakit.io.safetensors_file import encode, load_tensors
from lorakit.io.single_file import load_pickle, publish_file

FORMATS: Mapping[str, Format] = {
    each.name: each
    for each in (
        CLONEOFSIMO, LYCORIS, KOHYA, DIFFUSERS_PROCESSORS, DIFFUSERS_OLD, DIFFUSERS, LORALIB, GGUF,
    )
}  # fmt: skip
"""The formats of one file, in the order in which a file is compared with them."""

DIRECTORIES: Mapping[str, str] = {
    "peft": "PEFT's directory, where PEFT has words for the adapter",
    "native": "lorakit's own directory, for anything",
}
_SUFFIXES = {
    "safetensors": (".safetensors",),
    "pickle": (".bin", ".pt", ".pth", ".safetensors"),
    "gguf": (".gguf",),
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        source: The format that was read.
        format: The format that was written.
        path: Where to.
        targets: How many.
        parameters: Numbers in all their tensors.
        bytes: Of what was written.
        losses: What the new file does not say; none of it is what the adapter computes, but for rounding it names.
        not_finite: Tensors that hold a NaN or an infinity.
    """

    source: str
    format: str
    path: Path
    targets: int
    parameters: int
    bytes: int
    losses: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str,
    *,
    hints: Hints | None = None,
    source_format: str | None = None,
    name: str | None = None,
    only: str | None = None,
    under: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Converted:
    """Read an adapter in one format and write it in another.

    Args:
        source: A file, or a directory of PEFT's or our own.
        destination: A directory for ``"peft"`` and ``"native"``, else a file.
        to: A name in `FORMATS`, or ``"peft"`` or ``"native"``.
        hints: What the files do not say.
        source_format: What ``source`` is, if it is not to be recognised.
        name: Which adapter of a PEFT directory that holds several.
        only: Keep the targets in this part of a pipeline (``"unet"``), with paths from there on.
        under: Put the paths into this part.
        allow_pickle: Also read pickles, tensors alone.
        overwrite: Replace what is there.

    Raises:
        AdapterFileError: It cannot be read, or the new format cannot hold it; nothing was written then.
    """
    destination = Path(destination)
    _check_destination(destination, to, overwrite)
    hints = hints or Hints()
    state, found = read_any(
        source, hints=hints, source_format=source_format, name=name, allow_pickle=allow_pickle
    )
    losses = []
    if only is not None:
        before = len(state.spec.methods)
        state = _selected(state, only)
        if left := before - len(state.spec.methods):
            losses.append(f"{left} targets outside {only!r}, as asked")
    if under is not None:
        state = _renamed(state, {path: f"{under}.{path}" for path in state.spec.methods})
    losses += write_as(state, destination, to, hints=hints)
    bad = state.non_finite()
    return Converted(
        found, to, destination, len(state.spec.methods), state.numel, _bytes(destination), losses, bad
    )


@shared_effort()
def read_any(
    path: str | os.PathLike[str],
    *,
    hints: Hints | None = None,
    source_format: str | None = None,
    name: str | None = None,
    allow_pickle: bool = False,
) -> tuple[AdapterState, str]:
    """An adapter in any format, and which one that was.

    Args:
        path: A file or directory.
        hints: What it does not say.
        source_format: What it is, if it is not to be recognised.
        name: Which adapter of a PEFT directory that holds several.
        allow_pickle: Also read pickles, tensors alone.

    Raises:
        AdapterFileError: It is in no known format, damaged, or not whole.
    """
    path, hints = Path(path), hints or Hints()
    if source_format is not None:
        _check_format(source_format)
    path = _single_file(path) if source_format not in DIRECTORIES else path
    if path.is_dir() or not path.exists() or path.name == WEIGHTS or source_format in DIRECTORIES:
        state = read(path, name=name, allow_pickle=allow_pickle)
        return state, "native" if _is_native(path) else "peft"
    if name is not None:
        raise AdapterFileError(f"{path} is a file, so it has no adapter called {name!r}.")
    tensors, metadata = _load(path, allow_pickle)
    if source_format is not None:
        chosen = FORMATS[source_format]
    else:
        fitting = [each for each in FORMATS.values() if each.recognises(tensors, metadata)]
        if not fitting:
            return _as_peft(path, tensors), "peft"
        chosen = fitting[0]
    if not tensors:
        raise AdapterFileError(f"{path} holds no tensors.")
    try:
        return chosen.read(tensors, metadata, hints), chosen.name
    except AdapterFileError as error:
        raise type(error)(f"{path} ({chosen.name}): {error}") from error


def write_as(
    state: AdapterState, path: str | os.PathLike[str], to: str, *, hints: Hints | None = None
) -> list[str]:
    """Write an adapter in a format, whole or not at all; returns what the new file does not say.

    Args:
        state: The adapter.
        path: A directory for ``"peft"`` and ``"native"``, else a file.
        to: A name in `FORMATS`, or ``"peft"`` or ``"native"``.
        hints: What the format needs to know.

    Raises:
        AdapterFileError: The format cannot hold it, or it could not be written.
    """
    path = Path(path)
    _check_destination(path, to, overwrite=True)
    if to in DIRECTORIES:
        form: Form = "native" if to == "native" else "auto"
        if to == "peft" and (reasons := why_not_peft(state)):
            raise AdapterFileError(
                f"PEFT has no words for this adapter: {listing(reasons, most=3)}. lorakit's own form holds it: "
                "--to native."
            )
        write(state, path, form=form)
        return []
    chosen = FORMATS[to]
    written = chosen.write(state, hints or Hints())
    if chosen.container == "gguf":
        save_gguf(path, written)
    elif path.suffix == ".safetensors":
        publish_file(path, encode(written.tensors, written.metadata))
    else:
        buffer = io.BytesIO()
        torch.save({key: tensor.clone() for key, tensor in written.tensors.items()}, buffer)
        publish_file(path, [buffer.getbuffer()])
    return written.losses


# ---- files
def _load(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ".gguf":
        return load_gguf(path)
    if path.suffix not in _PICKLES:
        return load_tensors(path)
    if not allow_pickle:
        raise AdapterFileError(
            f"{path} is a pickle, which can run code when it is opened. If you trust it, read it with --allow-pickle "
            "(allow_pickle=True): only tensors are let through."
        )
    return load_pickle(path), {}


def _single_file(path: Path) -> Path:
    """The only adapter file of a directory that is not PEFT's, as diffusers leaves it."""
    if not path.is_dir() or (path / CONFIG).exists() or (path / WEIGHTS).exists():
        return path
    files = sorted(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 else path


def _as_peft(path: Path, tensors: Collection[str]) -> AdapterState:
    try:
        return read(path)
    except AdapterFileError as error:
        if "carry no configuration" not in str(error):
            raise
        raise AdapterFileError(
            f"{path} is in no format that is known here ({listing([*FORMATS, *DIRECTORIES], most=12)}), and carries no "
            f"configuration of PEFT's. Its keys begin with {listing([repr(key) for key in tensors], most=3)}."
        ) from error


def _is_native(path: Path) -> bool:
    from lorakit.io.embedded import embedded_in
    from lorakit.io.native import PEFT_TYPE

    embedded = embedded_in(path / WEIGHTS if path.is_dir() else path)
    return embedded is not None and embedded.config.get("peft_type") == PEFT_TYPE


def _check_format(name: str) -> None:
    known = [*FORMATS, *DIRECTORIES]
    if name not in known:
        raise AdapterFileError(
            f"No format is called {name!r}.{near_matches(name, known)} Known: {listing(known, most=12)}."
        )


def _check_destination(path: Path, to: str, overwrite: bool) -> None:
    _check_format(to)
    if to in DIRECTORIES:
        if path.is_file():
            raise AdapterFileError(f"{path} is a file; {to} writes a directory.")
        there = (path / WEIGHTS).exists()
    else:
        suffixes = _SUFFIXES[FORMATS[to].container]
        if path.suffix not in suffixes:
            raise AdapterFileError(
                f"{to} writes one file, which ends in {' or '.join(suffixes)}; got {path}."
            )
        there = path.exists()
    if there and not overwrite:
        raise AdapterFileError(
            f"{path} is there already: name another place, or replace it with --overwrite."
        )


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else (path / WEIGHTS).stat().st_size


# ---- parts of a pipeline
def _selected(state: AdapterState, part: str) -> AdapterState:
    kept = {p: p.removeprefix(f"{part}.") for p in state.spec.methods if p.startswith(f"{part}.")}
    if not kept:
        parts = sorted({split_component(p)[0] or p.partition(".")[0] for p in state.spec.methods})
        raise AdapterFileError(
            f"The adapter has no targets in {part!r}; its paths start with {listing(parts)}."
        )
    return _renamed(state, kept)


def _renamed(state: AdapterState, names: Mapping[str, str]) -> AdapterState:
    spec = state.spec
    methods = {new: spec.methods[old] for old, new in names.items()}
    shapes = {new: spec.shapes[old] for old, new in names.items()}
    tensors = {new: state.tensors[old] for old, new in names.items()}
    shared = state.shared if any(m.shared_shapes() for m in methods.values()) else {}
    return dataclasses.replace(
        state, spec=AdapterSpec(methods, shapes, spec.base, spec.info), tensors=tensors, shared=shared
    )
