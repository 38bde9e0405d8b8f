"""Python's search for garbage, put off while a program starts.

Imports, a recipe's models and the rows of a data set are hundreds of thousands of objects, all of which stay. Each time
their number has grown by a quarter, Python looks through all of them for cycles that nobody needs any more: a tenth of
the time until the first training step, and nothing to be found.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# New objects before the young ones are looked through, and how many such searches before the older ones are: what
# garbage there is, if there is any, stays bounded.
_SELDOM = (1_000_000, 10, 10)


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for garbage much more seldom inside a ``with`` block, and as before after it."""
    before = gc.get_threshold()
    gc.set_threshold(*_SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)
