"""Python's search for garbage, put off while a program starts.

Imports, a recipe's models and the rows of a data set are hundreds of thousands of objects, all of which stay. Each time
their number has grown by a quarter, Python looks through all of them for cycles that nobody needs any more: a tenth of
the time until the first training step, and nothing to be found.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# New objects before the young ones are looked through, and how many such searches before the older ones are: what
# garbage there is, if there is any, stays bounded.
_SELDOM = (1_000_000, 10, 10)
_changing = threading.Lock()
_inside: list[tuple[int, int, int]] = []  # the usual thresholds, once for each block that is running


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for garbage much more seldom inside a ``with`` block, and as before after the last that is running."""
    with _changing:
        _inside.append(_inside[0] if _inside else gc.get_threshold())
        gc.set_threshold(*_SELDOM)
    try:
        yield
    finally:
        with _changing:
            usual = _inside.pop()
            if not _inside:
                gc.set_threshold(*usual)
