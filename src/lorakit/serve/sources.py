"""From a path to an adapter that may be served: found under a folder, checked before it is believed, read strictly."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lorakit.core.adapter import AdapterState
from lorakit.errors import (
    AdapterBaseMismatchError,
    AdapterCorruptError,
    AdapterFileError,
    AdapterIncompatibleError,
    AdapterMismatchError,
    AdapterNotFoundError,
    InvalidAdapterIdError,
    LorakitError,
    ServeError,
    UnsafeAdapterFormatError,
    listing,
)
from lorakit.io.adapter_directory import CONFIG, WEIGHTS, read
from lorakit.io.safetensors_file import read_header
from lorakit.models.chat_template import RENDERING_FILE, TEMPLATE_FILE, OwnTemplate, own_template
from lorakit.serve.base_facts import BaseFacts, check_belongs
from lorakit.serve.manifest import MANIFEST, TrustedKeys, read_manifest, verify_files
from lorakit.serve.versions import rank_at

_log = logging.getLogger(__name__)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MOST_CONFIG_BYTES = 16 << 20
_MOST_DIMENSIONS = 8

Identity = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Limits:
    """What an adapter may at most be.

    Attributes:
        header_bytes: Of the description at the head of a ``.safetensors`` file.
        tensor_bytes: Of all tensors.
        rank: At any target; None for any.
    """

    header_bytes: int = 16 << 20
    tensor_bytes: int = 2 << 30
    rank: int | None = None


@dataclass(frozen=True)
class Files:
    """The files of an adapter.

    Attributes:
        path: Of the adapter, as it was asked for, with symbolic links resolved.
        weights: The tensors.
        others: The configuration, the signed manifest, and the chat template of the training with what identifies
            it; those that are there.
        identity: Name, inode, time of change and size of each: differs when one was replaced.
    """

    path: Path
    weights: Path
    others: tuple[Path, ...]
    identity: Identity

    @property
    def weights_bytes(self) -> int:
        """The size of the file of the tensors."""
        return self.identity[0][3]


class Adapter(NamedTuple):
    """What the files of an adapter hold.

    Attributes:
        state: Its methods and tensors.
        template: The chat template that it was trained with, where the files tell one.
    """

    state: AdapterState
    template: OwnTemplate | None = None


def resolve_source(source: str | os.PathLike[str], root: Path | None, *, anywhere: bool) -> Path:
    """The path of an adapter, symbolic links resolved; a relative one is meant from the root.

    Raises:
        InvalidAdapterIdError: It is no path, or leads out of the root.
    """
    text = os.fspath(source)
    if not isinstance(text, str) or not text or "\0" in text or len(text) > 4096:
        raise InvalidAdapterIdError(f"{text[:100]!r} is no path of an adapter.", param="source")
    if anywhere:
        return Path(os.path.realpath(text))
    if root is None:
        raise InvalidAdapterIdError(
            "This server has no folder of adapters, so none can be loaded by its path.", param="source"
        )
    top = os.path.realpath(root)
    path = os.path.realpath(os.path.join(top, text))
    if not _inside(path, top):
        raise InvalidAdapterIdError(
            f"{text[:200]!r} is not in the server's folder of adapters. Put the adapter there and name its sub-folder.",
            param="source",
        )
    return Path(path)


def find_files(path: Path, within: Path | None) -> Files:
    """The files of the adapter at a path: a folder, one that holds nothing but one adapter, or a ``.safetensors`` file.

    Args:
        path: With symbolic links resolved.
        within: No file may lie outside of it, by a symbolic link either.

    Raises:
        AdapterNotFoundError: There is none, or it cannot be read.
        UnsafeAdapterFormatError: There is only a pickle.
        InvalidAdapterIdError: A symbolic link leads out of ``within``.
    """
    try:
        kind = path.stat().st_mode
        folder = path
        if stat.S_ISDIR(kind):
            names = set(os.listdir(path))
            if not names & {WEIGHTS, CONFIG} and not _pickled(names):
                inside = [n for n in sorted(names) if (path / n / WEIGHTS).is_file()]
                if len(inside) == 1:
                    folder, names = path / inside[0], set(os.listdir(path / inside[0]))
                elif inside:
                    raise AdapterNotFoundError(
                        f"{path.name!r} holds several adapters: {listing(inside)}. Name one of them."
                    )
            if WEIGHTS not in names:
                raise _no_weights(path, names)
            weights = folder / WEIGHTS
        elif path.suffix in _PICKLES:
            raise _no_weights(path, {path.name})
        else:
            weights, folder = path, path.parent
        found = [weights, *(folder / name for name in (CONFIG, MANIFEST) if _is_there(folder / name))]
        if _is_there(
            folder / RENDERING_FILE
        ):  # a template that nothing identifies says nothing of the training
            found += [folder / n for n in (RENDERING_FILE, TEMPLATE_FILE) if _is_there(folder / n)]
        identity = tuple(_facts(file, within) for file in found)
    except OSError as error:
        raise AdapterNotFoundError(
            f"There is no adapter that can be read at {path.name!r}: {error.strerror or error}."
        ) from None
    return Files(path, weights, tuple(found[1:]), identity)


def check_files(files: Files, limits: Limits) -> int:
    """Check sizes and the header before anything is allocated by what they say; the bytes of the tensors.

    Raises:
        AdapterCorruptError: A file is damaged.
        AdapterIncompatibleError: The tensors have more bytes than is allowed.
    """
    for name, _, _, size in files.identity[1:]:
        if size > _MOST_CONFIG_BYTES:
            raise AdapterCorruptError(f"{name} has {size} bytes, which no such file has.")
    try:
        _check_header(files, limits)
        begin, _ = read_header(files.weights)
        for other in files.others:
            if other.name != TEMPLATE_FILE:
                _check_json(other)
    except AdapterFileError as error:
        raise AdapterCorruptError(_without_folder(error, files)) from None
    except OSError as error:
        raise AdapterNotFoundError(
            f"{files.weights.name} cannot be read: {error.strerror or error}."
        ) from None
    data_bytes = files.weights_bytes - begin
    if data_bytes > limits.tensor_bytes:
        raise AdapterIncompatibleError(
            f"The adapter's tensors have {data_bytes} bytes; at most {limits.tensor_bytes} are served here."
        )
    return data_bytes


def read_adapter(files: Files, base: BaseFacts, limits: Limits, trusted: TrustedKeys | None) -> Adapter:
    """Read an adapter whole, and check all that can be checked without running it.

    With ``trusted``, the files are copied first, and what is verified is what is read.

    Raises:
        ServeError: It is not signed, damaged, not for this base, or cannot be served; see rows 3 to 8 of the table in
            ``docs/guide/serving.md``.
    """
    if trusted is None:
        return _read(files, base, limits)
    with tempfile.TemporaryDirectory(prefix="lorakit-verify-") as folder:
        copies = []
        try:
            for path in (files.weights, *files.others):
                copies.append(Path(folder) / path.name)
                shutil.copyfile(path, copies[-1])
        except OSError as error:
            raise AdapterNotFoundError(f"The adapter cannot be read: {error.strerror or error}.") from None
        verify_files(Path(folder), trusted, needed=[copy.name for copy in copies])
        identity = tuple(_facts(copy, None) for copy in copies)
        copied = Files(files.path, copies[0], tuple(copies[1:]), identity)
        check_files(copied, limits)
        return _read(copied, base, limits)


def _read(files: Files, base: BaseFacts, limits: Limits) -> Adapter:
    manifest = next((path for path in files.others if path.name == MANIFEST), None)
    if manifest is not None and base.digest is not None:
        made_for = read_manifest(manifest).base_digest
        if made_for not in (None, base.digest):
            raise AdapterBaseMismatchError(
                f"The adapter's manifest is for the base with digest {made_for}; this one's is {base.digest}."
            )
    try:
        state = read(files.weights, outline=base.outline)
    except AdapterMismatchError as error:
        raise AdapterBaseMismatchError(_without_folder(error, files)) from None
    except LorakitError as error:
        check_files(files, limits)  # replaced by a damaged one since it was looked at
        raise AdapterIncompatibleError(_without_folder(error, files)) from None
    except MemoryError:
        raise
    except Exception as error:  # whatever a strange configuration may lead to, nothing was attached
        _log.warning("reading %s failed", files.path, exc_info=True)
        raise AdapterCorruptError(
            f"The adapter's files are not as any program writes them: {type(error).__name__}: {error}."
        ) from None
    bad = state.non_finite()
    if bad:
        raise AdapterCorruptError(
            f"{len(bad)} tensors hold a NaN or an infinity: {listing(bad)}. The adapter was damaged in training."
        )
    check_belongs(state, base)
    if limits.rank is not None:
        large = [f"{p} ({r})" for p in state.spec.methods if (r := rank_at(state, p) or 0) > limits.rank]
        if large:
            raise AdapterIncompatibleError(
                f"The rank of {len(large)} targets is over {limits.rank}, the most served here: {listing(large)}."
            )
    if base.name and state.spec.base and Path(state.spec.base).name != Path(base.name).name:
        _log.info("%s names the base %r; this one is %r", files.path.name, state.spec.base, base.name)
    return Adapter(state, _template(files))


def _template(files: Files) -> OwnTemplate | None:
    if not any(path.name == RENDERING_FILE for path in files.others):
        return None
    try:
        return own_template(files.weights.parent)
    except AdapterFileError as error:
        raise AdapterCorruptError(_without_folder(error, files)) from None


def _check_header(files: Files, limits: Limits) -> None:
    """Refuse a header that would cost much to understand: too long, too many digits or dimensions."""
    with files.weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > files.weights_bytes:
            return  # what is wrong is told by read_header
        if length > limits.header_bytes:
            raise AdapterCorruptError(
                f"The header of {files.weights.name} is said to be {length} bytes long; at most {limits.header_bytes} "
                "are read here."
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise AdapterCorruptError(
                f"{files.weights.name} is damaged: its header is not JSON ({str(error)[:200]})."
            ) from None
    for name, entry in header.items() if isinstance(header, dict) else ():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and len(shape) > _MOST_DIMENSIONS:
            raise AdapterCorruptError(
                f"{files.weights.name} is damaged: tensor {name[:100]!r} is said to have {len(shape)} dimensions."
            )


def _check_json(path: Path) -> None:
    try:
        if isinstance(json.loads(path.read_bytes().decode("utf-8")), dict):
            return
    except (ValueError, RecursionError) as error:
        raise AdapterCorruptError(f"{path.name} is not JSON: {str(error)[:200]}.") from None
    raise AdapterCorruptError(f"{path.name} does not hold a JSON object.")


def _facts(file: Path, within: Path | None) -> tuple[str, int, int, int]:
    found = file.stat()
    if within is not None and not _inside(os.path.realpath(file), os.path.realpath(within)):
        raise InvalidAdapterIdError(
            f"{file.name} of the adapter {file.parent.name!r} is a link that leads out of the server's folder of "
            "adapters. Put the file itself there.",
            param="source",
        )
    if not stat.S_ISREG(found.st_mode):
        raise AdapterNotFoundError(f"{file.name} of the adapter {file.parent.name!r} is not a regular file.")
    return file.name, found.st_ino, found.st_mtime_ns, found.st_size


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _inside(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip(os.sep) + os.sep)


def _pickled(names: set[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(_PICKLES))


def _no_weights(path: Path, names: set[str]) -> ServeError:
    pickles = _pickled(names)
    if pickles:
        return UnsafeAdapterFormatError(
            f"{path.name!r} holds {listing(pickles)}, a pickle, which can run code when it is opened. Convert it where "
            "you trust it: lorakit convert SOURCE NEW --to peft --allow-pickle."
        )
    return AdapterNotFoundError(f"{path.name!r} holds no adapter: {WEIGHTS} is not there.")


def _without_folder(error: Exception, files: Files) -> str:
    """The message without the server's own folders, which are no client's business."""
    text = str(error)
    for folder in (files.weights.parent, files.path, files.path.parent):
        text = text.replace(f"{folder}{os.sep}", "").replace(str(folder), files.path.name)
    return text
