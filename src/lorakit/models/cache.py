"""The user's cache of ready models: how a folder enters it whole or not at all.

A folder is built beside its final place and renamed when it is complete, so a killed process leaves a temporary
folder and never half a model. What is complete is written down in a manifest (size and SHA-256 of every file) that
is the last file written; later runs compare against it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lorakit.folders import put_in_place

MANIFEST = "lorakit-manifest.json"

# Files up to this size are hashed on every use (milliseconds); of larger ones the quick check compares the size.
_QUICK_HASH_BYTES = 8 * 1024**2


def sha256(path: Path) -> str:
    """The SHA-256 of a file as lowercase hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1024**2):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(folder: Path, source: Mapping[str, str]) -> None:
    """Record every file of `folder` (size in bytes, SHA-256) and what it was made from."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({"source": dict(source), "files": files}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def find_damage(folder: Path, source: Mapping[str, str], *, full: bool = False) -> str | None:
    """Say what is wrong with a cached folder, or None if it is whole.

    The quick check reads the manifest, compares the size of every file and hashes the small ones, so a truncated
    weight file or an edited config is found in milliseconds. `full` hashes the large files too.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        made_from, files = manifest["source"], dict(manifest["files"])
        recorded = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    if made_from != dict(source):
        return "it was made from something else"
    for name, (size, digest) in recorded.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
        if (full or size <= _QUICK_HASH_BYTES) and sha256(path) != digest:
            return f"the content of {name} has changed"
    return None


@contextmanager
def building(target: Path, source: Mapping[str, str]) -> Iterator[Path]:
    """Build a folder that appears at `target` only when the block ends without an exception.

    Yields an empty working folder on the same disk. What the block puts into its subfolder `model` becomes `target`;
    the rest (downloads, unpacked archives) is thrown away. If another process finished the same folder meanwhile,
    that one stays; a damaged one is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=_work_prefix(target), dir=target.parent))
    try:
        model = work / "model"
        model.mkdir()
        yield work
        write_manifest(model, source)
        try:
            if target.exists() and find_damage(target, source) is not None:
                put_in_place(model, target)
            else:
                model.rename(target)
        except OSError:
            if find_damage(target, source) is not None:
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Delete working folders of killed processes. Only safe while holding the lock of `target`."""
    for leftover in target.parent.glob(_work_prefix(target) + "*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _work_prefix(target: Path) -> str:
    return f".building-{target.name}-"


@contextmanager
def exclusive(lock: Path, on_wait: Callable[[], None]) -> Iterator[bool]:
    """Let one process at a time into the block; `on_wait` is called once if another is inside.

    Yields whether the lock is held. Where the system or the disk has no such locks, it yields False and goes on: two
    processes may then do the same work twice, and `building` keeps the result right all the same. The system drops
    the lock of a killed process by itself; the empty lock file stays.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as handle:
        held = _try_lock(handle)
        if held is False:
            on_wait()
        while held is False:
            time.sleep(0.1)
            held = _try_lock(handle)
        yield bool(held)  # closing the file drops the lock


def _try_lock(handle: BinaryIO) -> bool | None:
    """True: locked. False: another process has it. None: no locks here."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network disks
        return None
    return True
