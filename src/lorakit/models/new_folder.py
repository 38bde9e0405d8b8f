"""A folder that appears whole or not at all: built beside its place under a hidden name, renamed at the end."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import ConfigError


@contextmanager
def new_folder(out: Path, inputs: Sequence[Path], *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` when the block ends without an exception.

    A process that is killed inside leaves the hidden folder, which the next call for the same ``out`` removes.

    Args:
        out: Must be new or empty, unless it is to be overwritten.
        inputs: What is still needed: ``out`` may neither hold it nor lie in it.
        overwrite: Replace what is in ``out``.

    Raises:
        ConfigError: ``out`` is in use.
    """
    check_new(out, inputs, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    part = out.parent / f"{_prefix(out)}{os.getpid()}-{secrets.token_hex(4)}.part"
    part.mkdir()
    try:
        yield part
        _replace(out, part)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_new(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Raise `ConfigError` where ``out`` cannot become a new folder, see `new_folder`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ConfigError(
            f"{out} exists and is not empty: name another folder, or overwrite it (--overwrite)."
        )
    place = out.resolve()
    for needed in (Path.cwd(), *inputs):
        there = needed.resolve()
        if (
            there == place
            or there.is_relative_to(place)
            or (needed != Path.cwd() and place.is_relative_to(there))
        ):
            raise ConfigError(f"The merged model cannot go to {out}: {needed} is there. Name another folder.")


def _replace(out: Path, new: Path) -> None:
    """Put a finished folder in place of an older one, which is removed only when the new one is there."""
    if not out.exists():
        new.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    old = out.rename(aside / out.name)
    try:
        new.rename(out)
    except OSError:
        old.rename(out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name}.{socket.gethostname()}-"


def _remove_leftovers(out: Path) -> None:
    """Delete what killed processes of this machine left."""
    for folder in out.parent.glob("*.part"):
        mark = folder.name.removeprefix(_prefix(out))
        pid = mark.partition("-")[0]
        if mark != folder.name and pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    if os.name == "nt":
        return True  # there, os.kill would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
