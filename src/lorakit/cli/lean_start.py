"""transformers' Trainer without three large packages that it imports wherever they are installed.

PEFT (and bitsandbytes and torch's compiler with it), datasets (with pandas) and scipy are a quarter of the time until
the first training step of a machine that has them all, and training a lorakit adapter calls none of them: there is no
PEFT model, rows are lists, and scipy is for object detection. The modules of transformers that import them are told
that they are not installed; whoever else asks is told the truth, and what imports them itself, as ``data: hub:...``
does with datasets, gets them.

That holds as long as the process lives, so it is done in lorakit's own program only, and not where a notebook may
train a PEFT model after an adapter of lorakit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

# Which modules of transformers ask for a package in order to import it.
_ASKING: Mapping[str, tuple[str, ...]] = {
    "peft": ("transformers.trainer", "transformers.trainer_utils"),
    "datasets": ("transformers.trainer",),
    "scipy": ("transformers.loss.",),
}
_own_process = False


def claim_process() -> None:
    """Say that this process is the program `lorakit`, and runs nothing else."""
    global _own_process
    _own_process = True


def import_trainer() -> None:
    """Import transformers' Trainer, in a process of our own without the packages that it does not need here."""
    if not _own_process or "transformers.trainer_utils" in sys.modules:
        return
    with _unneeded_left_out():
        import transformers.trainer  # noqa: F401


@contextmanager
def _unneeded_left_out() -> Iterator[None]:
    import transformers.utils as asked

    changed = {}
    for package, modules in _ASKING.items():
        name = f"is_{package}_available"
        installed = getattr(asked, name, None)  # a later transformers may ask otherwise, and be slow again
        if installed is not None:
            changed[name] = installed
            setattr(asked, name, _hidden_from(modules, installed))
    try:
        yield
    finally:
        for name, installed in changed.items():
            setattr(asked, name, installed)


def _hidden_from(modules: tuple[str, ...], installed: Callable[[], bool]) -> Callable[[], bool]:
    """An answer that is no for some modules (those with a dot at the end: for all below), then and later."""

    @wraps(installed)
    def answer(*args: Any) -> bool:
        asking = str(sys._getframe(1).f_globals.get("__name__"))
        hidden = any(asking == name or (name[-1] == "." and asking.startswith(name)) for name in modules)
        return not hidden and installed(*args)

    return answer
