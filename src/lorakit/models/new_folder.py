"""A folder that appears whole or not at all: built beside its place under a hidden name, renamed at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorakit.errors import ConfigError
from lorakit.folders import hidden_beside, left_beside, put_back, put_in_place

_PART = ".part"


@contextmanager
def new_folder(out: Path, inputs: Sequence[Path], *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` when the block ends without an exception.

    A process that is killed inside leaves the hidden folder, which the next call for the same ``out`` removes. What an
    older folder goes through when it is replaced is told in `lorakit.folders`.

    Args:
        out: Must be new or empty, unless it is to be overwritten.
        inputs: What is still needed: ``out`` may neither hold it nor lie in it.
        overwrite: Replace what is in ``out``.

    Raises:
        ConfigError: ``out`` is in use.
    """
    check_new(out, inputs, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in left_beside(out, _PART):
        shutil.rmtree(left, ignore_errors=True)
    part = hidden_beside(out, _PART)
    part.mkdir()
    try:
        yield part
        put_in_place(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_new(out: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Raise `ConfigError` where ``out`` cannot become a new folder, see `new_folder`.

    An older folder that a killed process had moved out of the way is put back first.
    """
    put_back(out)
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
