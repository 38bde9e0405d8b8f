"""The support matrix of the documentation, asked of the methods themselves.

``python -m tests.contracts.matrix`` writes ``docs/methods/support.md``; a test says when it is out of date.
"""

from __future__ import annotations

from pathlib import Path

from tests.contracts.kinds import KINDS
from tests.contracts.pairs import SUPPORTED, UNSUPPORTED
from tests.contracts.settings import SETTINGS

OWN_COLUMN = ("nf4", "int8", "bnb4", "bnb8", "slice")
PAGE = Path(__file__).parents[2] / "docs" / "methods" / "support.md"

HEAD = """\
# What works on what

Every tick is a method on a kind of layer that the contract suite runs: forward and gradients against a dense float64
formula, merge and bitwise unmerge where there is a weight to merge into, rows of a mixed batch, a round trip through
a file, copies, pickles, `torch.compile`. Every number is a reason, listed below, that `supports()` gives for refusing a
layer; beside a tick it holds for some of the column's layers only. A dash is a question that makes no sense (a vector
is no matrix). This page is printed from the registry by `python -m tests.contracts.matrix`.
"""


def page() -> str:
    """The page as Markdown."""
    columns: dict[str, list[str]] = {}
    for name in KINDS:
        columns.setdefault(_column(name), []).append(name)
    notes: dict[str, int] = {}
    lines = [HEAD, f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for setting in SETTINGS:
        cells = [_cell(setting, kinds, notes) for kinds in columns.values()]
        lines.append(f"| `{setting}` | {' | '.join(cells)} |")
    lines += ["", "## Why not", ""]
    lines += [f"{number}. {reason}" for reason, number in notes.items()]
    lines += ["", "## What the rows are", "", "| method | settings |", "|---|---|"]
    lines += [f"| `{name}` | `{chosen.method!r}` |" for name, chosen in SETTINGS.items()]
    lines += ["", "## What the columns are", ""]
    lines += [
        f"- **{column}**: {', '.join(f'`{kind}`' for kind in kinds)}" for column, kinds in columns.items()
    ]
    return "\n".join(lines) + "\n"


def _column(kind: str) -> str:
    """Kinds of one family share a column; a storage of its own, or a slice, has one to itself."""
    family, _, variant = kind.partition("-")
    return next((f"{family}, {word}" for word in OWN_COLUMN if word in variant), family)


def _cell(setting: str, kinds: list[str], notes: dict[str, int]) -> str:
    """A tick where all kinds of a column work, else the numbers of the reasons."""
    works = [kind for kind in kinds if (setting, kind) in SUPPORTED]
    reasons = dict.fromkeys(UNSUPPORTED[setting, kind] for kind in kinds if (setting, kind) in UNSUPPORTED)
    numbers = [f"<sup>{notes.setdefault(reason, len(notes) + 1)}</sup>" for reason in reasons]
    if works:
        return " ".join(["✓", *numbers])
    return " ".join(numbers) or "–"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
