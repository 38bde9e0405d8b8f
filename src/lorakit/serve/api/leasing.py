"""Holds on adapters while a request is answered: waited for, and given back whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future

from lorakit.serve.versions import Lease

Leases = list[Lease | None]
"""Holds on a model; None is the base."""


async def leased(future: Future[Lease]) -> Lease:
    """Wait for a lease; one that comes after its request was given up is given back."""
    try:
        return await asyncio.shield(asyncio.wrap_future(future))
    except asyncio.CancelledError:
        future.add_done_callback(_give_back)
        raise


def release(leases: Sequence[Lease | None]) -> None:
    """Give back those that are not the base."""
    for lease in leases:
        if lease is not None:
            lease.release()


def _give_back(future: Future[Lease]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().release()
