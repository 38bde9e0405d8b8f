"""Whether the trackers that a recipe names are installed: asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from lorakit.errors import MissingDependencyError


def check_installed(names: Sequence[str]) -> None:
    """Whether the trackers that a recipe names are installed; to be asked before anything is loaded.

    Raises:
        MissingDependencyError: Which one is not.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"train.report_to names {', '.join(missing)}, which is not installed. Install it with: pip install "
            f"{' '.join(missing)}; or leave it out: metrics.jsonl is written in any case."
        )
