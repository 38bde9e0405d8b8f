"""Writing results: tables for people, JSON for programs. Results go to standard output, progress elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
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


def quiet_loading() -> None:
    """Without transformers' bar for loading weights, which tells little and breaks lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
