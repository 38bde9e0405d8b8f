"""Keep freed memory in the process while it trains on the CPU.

A step frees tensors of some megabytes and asks for the same again. By default glibc gives such a tensor back to the
system, which must then clear and map every page of the next one: a tenth of a step. What is kept is given back at the
end.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_IN_HEAP = 2**25  # glibc takes no more
_NEVER, _USUAL_BYTES = -1, 2**26


@contextmanager
def kept_heap(wanted: bool = True) -> Iterator[bool]:
    """Inside a ``with`` block freed memory stays with the process, which gives it back at the end.

    Args:
        wanted: False does nothing.

    Yields:
        Whether this C library can do it.
    """
    library = ctypes.CDLL(None) if wanted and sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield False
        return
    set_ = [library.mallopt(_MMAP_THRESHOLD, _LARGEST_IN_HEAP), library.mallopt(_TRIM_THRESHOLD, _NEVER)]
    try:
        yield all(set_)
    finally:
        library.mallopt(_TRIM_THRESHOLD, _USUAL_BYTES)
        library.malloc_trim(0)
