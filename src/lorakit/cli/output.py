"""Writing results: tables for people, JSON for programs. Results go to standard output, progress elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def say(text: str = "") -> None:
    """A line of a result."""
    sys.stdout.write(f"{text}\n")


def say_json(value: Any) -> None:
    """A result for programs."""
    say(json.dumps(value, indent=2))


def say_pairs(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, one a line; nothing is wrapped, so that paths can be copied."""
    listed = list(pairs)
    width = max((len(name) for name, _ in listed), default=0)
    say(title)
    for name, value in listed:
        say(f"  {name.ljust(width)}  {value}")


def say_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> None:
    """A table; the first ``left`` columns are text, the others numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold", no_wrap=i >= left)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)


def size(count: int) -> str:
    """``9.8 MB``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return ""


def check_free(out: Path, overwrite: bool) -> None:
    """Raise `ConfigError` where a folder for an adapter would get in the way of what is there."""
    from lorakit.errors import ConfigError

    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, and the result is a folder: name another place.")
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not empty: name another folder, or replace it (--overwrite).")


def quiet_loading() -> None:
    """Without transformers' bar for loading weights, which tells little and breaks lines.

    And without the word of bitsandbytes, where that is installed, that a kernel is missing which nothing here calls.
    """
    import logging

    from transformers.utils import logging as told

    told.disable_progress_bar()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
