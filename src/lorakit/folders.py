"""A finished folder put in place of another: at every moment one of the two is under the name, or can be put back.

On Linux the two change places in one step (``renameat2`` with ``RENAME_EXCHANGE``), where the file system can do that.
Elsewhere the old folder is renamed to a hidden name beside its place and the new one to the place: a process that is
killed in between leaves nothing under the name, and `put_back` undoes the first step.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any

_OLD = ".old"
_WORKING_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE


def put_in_place(new: Path, place: Path) -> None:
    """Put a finished folder under a name. An older folder there is removed when the new one is there.

    Args:
        new: The folder; on the same disk as its place.
        place: Its name. Of a link, the link is replaced and not what it leads to.

    Raises:
        OSError: It could not be done; what was there is there.
    """
    put_back(place)
    if not os.path.lexists(place):
        new.rename(place)
    elif exchange(new, place):
        _remove(new)
    else:
        old = hidden_beside(place, _OLD)
        place.rename(old)
        try:
            new.rename(place)
        except OSError:
            with contextlib.suppress(OSError):  # somebody else was quicker: theirs stays
                old.rename(place)
            raise
        finally:
            if os.path.lexists(place):
                _remove(old)


def put_back(place: Path) -> None:
    """Give an old folder its name again, where a process of this machine was killed while it was replaced.

    Where a folder is under the name, what is left of older ones is removed.

    Raises:
        OSError: There is an old folder, and it cannot be renamed.
    """
    for old in left_beside(place, _OLD):
        if os.path.lexists(place):
            _remove(old)
        else:
            old.rename(place)


def old_beside(place: Path) -> list[str]:
    """The older folders that were moved out of the way of this one, by whatever process of whatever machine."""
    try:
        names = sorted(os.listdir(place.parent))
    except OSError:
        return []
    return [
        str(place.parent / name)
        for name in names
        if name.startswith(f".{place.name}.") and name.endswith(_OLD)
    ]


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system or the disk cannot."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(_WORKING_FOLDER, names[0], _WORKING_FOLDER, names[1], _EXCHANGE) == 0)


def hidden_beside(place: Path, ending: str) -> Path:
    """A new hidden name beside a folder, which says which process of which machine took it."""
    return place.parent / f"{_prefix(place)}{os.getpid()}-{secrets.token_hex(4)}{ending}"


def left_beside(place: Path, ending: str) -> list[Path]:
    """What has such a name and is of a process of this machine that has died."""
    prefix = _prefix(place)
    try:
        names = sorted(os.listdir(place.parent))
    except OSError:  # no such folder: nothing is left in it
        return []
    return [
        place.parent / name
        for name in names
        if name.startswith(prefix)
        and name.endswith(ending)
        and not _runs(name[len(prefix) :].partition("-")[0])
    ]


def _prefix(place: Path) -> str:
    return f".{place.name}.{socket.gethostname()}-"


def _runs(pid: str) -> bool:
    if os.name == "nt" or not pid.isdigit():
        return True  # on Windows, os.kill would end the process
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _remove(path: Path) -> None:
    """Delete a folder, a file or a link, as far as the disk allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@cache
def _renameat2() -> Any:
    """The C library's function; None where there is none (glibc has it since 2.28)."""
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function
