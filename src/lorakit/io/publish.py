"""Replacing an adapter's files so that a full disk or a kill at any moment leaves the old adapter or the new one.

The weights carry a copy of their own configuration (see `lorakit.io.adapter_directory`), so two files are replaced
by two renames without ever being a mix:

1. both files are written under temporary names in the same directory and forced to disk, then the directory is;
2. the weights are renamed into place: from here on the new adapter is whole, for the weights say what they are;
3. the configuration is renamed into place.

A process that dies before 2 leaves the old adapter; one that dies between 2 and 3 leaves the new weights with the
old configuration *and* the new configuration under its temporary name. `interrupted` recognises that, and the next
write finishes it. A lock on the directory keeps two writers apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import AdapterFileError
from lorakit.io.embedded import embedded_in

try:
    import fcntl
except ImportError:  # Windows has no advisory locks on directories
    fcntl = None  # type: ignore[assignment]

_DAY = 86_400.0


class Disk:
    """The operations that can fail, in one place, so that a test can make each of them fail."""

    def write(self, path: Path, chunks: Iterable[Any]) -> None:
        """A new file, forced to disk."""
        with path.open("xb", buffering=1 << 20) as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    def rename(self, old: Path, new: Path) -> None:
        """Replace in one step."""
        os.replace(old, new)

    def sync(self, directory: Path) -> None:
        """Force the directory's own entries to disk."""
        if os.name == "nt":
            return
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


DISK = Disk()


def publish(directory: Path, weights: tuple[str, Iterable[Any]], config: tuple[str, bytes]) -> None:
    """Replace the weights and the configuration of the adapter in a directory, each given as ``(name, content)``.

    Raises:
        AdapterFileError: It could not be done; the message says which adapter is there now.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterFileError(
            f"{directory} cannot be made a directory: {error.strerror or error}."
        ) from error
    with _locked(directory):
        mark = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
        temporary = {name: directory / f".{name}.{mark}" for name in (weights[0], config[0])}
        step = "before"
        try:
            _tidy(directory, weights[0], config[0])
            DISK.write(temporary[weights[0]], weights[1])
            DISK.write(temporary[config[0]], (config[1],))
            DISK.sync(directory)
            DISK.rename(temporary[weights[0]], directory / weights[0])
            step = "between"
            DISK.rename(temporary[config[0]], directory / config[0])
            step = "after"
            DISK.sync(directory)
        except OSError as error:
            raise AdapterFileError(_failure(directory, config[0], step, error)) from error
        finally:
            if step == "before":
                for path in temporary.values():
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)


def interrupted(directory: Path, config_name: str, wanted: Mapping[str, Any]) -> Path | None:
    """The configuration ``wanted`` that a writer had no time to rename into place, if it is there."""
    for path in _temporary(directory, config_name):
        try:
            if json.loads(path.read_bytes()) == wanted:
                return path
        except (OSError, ValueError):
            continue  # a half-written file of a writer that died earlier
    return None


def _tidy(directory: Path, weights_name: str, config_name: str) -> None:
    """Finish what a dead writer had almost done, then remove what dead writers left."""
    left = [p for name in (weights_name, config_name) for p in _temporary(directory, name) if _is_dead(p)]
    if not left:
        return
    embedded = embedded_in(directory / weights_name)
    if embedded is not None and embedded.config != _json(directory / config_name):
        ready = interrupted(directory, config_name, embedded.config)
        if ready is not None:
            DISK.rename(ready, directory / config_name)
    for path in left:
        path.unlink(missing_ok=True)


def _temporary(directory: Path, name: str) -> list[Path]:
    return sorted(directory.glob(f".{name}.*.tmp"))


def _is_dead(path: Path) -> bool:
    """Whether the process that was writing a temporary file is gone: exact on this host, by age for others."""
    host, pid, _ = path.name.rsplit("-", 2)
    if host.endswith(f".{socket.gethostname()}") and pid.isdigit():
        if int(pid) == os.getpid():
            return fcntl is not None  # the lock says that no other thread of ours is writing
        if os.name == "nt":
            return time.time() - path.stat().st_mtime > _DAY
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False
    return time.time() - path.stat().st_mtime > _DAY


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _failure(directory: Path, config_name: str, step: str, error: OSError) -> str:
    reason = error.strerror or str(error)
    if step == "before":
        return f"The adapter could not be saved in {directory}: {reason}. What was there before is untouched."
    return (
        f"The adapter was written to {directory}, but {config_name} could not be replaced: {reason}. "
        "lorakit reads the new "
        "adapter whole; other programs would see the old configuration. Save it again when the disk allows."
    )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory against other writers; without effect where the file system has no locks."""
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
