"""How many threads torch works with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """With one thread on the CPU, for many small operations in a row.

    Decomposing a matrix of a few columns is no work to share: threads that wait for each other take as long on a quiet
    machine, and thirty times as long on a busy one. Other threads of the program see the setting meanwhile.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
