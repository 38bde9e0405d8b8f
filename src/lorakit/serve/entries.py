"""What the adapter store tells of itself: its adapters, what an unload came to, its counters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorakit.serve.versions import Lease

Tier = Literal["disk", "host", "prepared"]


@dataclass(frozen=True)
class AdapterEntry:
    """One name of an adapter.

    Attributes:
        name: The name; an alias has an entry of its own.
        version: The number of the version that the name leads to; None where it was never read.
        alias_of: For an alias, ``name@version`` of what it leads to.
        digest: Of the content; None where it was never read.
        tier: ``"disk"`` (a request would have it read), ``"host"`` (in memory) or ``"prepared"`` (ready to run).
        bytes: Of the tensors; None where it was never read.
        rank: The largest rank of any target.
        targets: How many there are.
        methods: The methods' names.
        pinned: Whether it stays in memory.
        in_use: Requests that hold it now.
        uses: Leases so far.
        loads: How often it was read.
        idle_seconds: Since it was last asked for.
        source: Where it was read from.
        base: The base model that its file names; information.
        versions: The numbers under which ``name@number`` can be asked for.
    """

    name: str
    version: int | None = None
    alias_of: str | None = None
    digest: str | None = None
    tier: Tier = "disk"
    bytes: int | None = None
    rank: int | None = None
    targets: int | None = None
    methods: tuple[str, ...] = ()
    pinned: bool = False
    in_use: int = 0
    uses: int = 0
    loads: int = 0
    idle_seconds: float | None = None
    source: str | None = None
    base: str | None = None
    versions: tuple[int, ...] = ()


@dataclass(frozen=True)
class UnloadReport:
    """What became of an adapter that was unloaded.

    Attributes:
        status: ``"unloaded"``, or ``"draining"`` while requests hold it. Its names lead nowhere in both cases.
        in_flight: Requests that hold it.
        abort: With ``force``, their leases: the caller ends those requests, and the memory is freed.
        digests: The contents that no name leads to any more: what was kept for them elsewhere can go.
    """

    status: Literal["unloaded", "draining"]
    in_flight: int
    abort: tuple[Lease, ...] = ()
    digests: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreStats:
    """Counters and gauges of a store, all read at one moment.

    Attributes:
        bytes: Of everything in memory, what is being read and what is being freed included.
        max_bytes: The budget.
        prepared_bytes: The part of it that is ready to run.
        contents: Contents in memory.
        in_use: Leases that are out.
        loading: Loads that are under way.
        waiting: Requests and loads that wait for room.
        draining: Contents without a name that requests still hold.
        hits: Leases that needed no loading.
        misses: Leases that did.
        loads: Contents that were read.
        failures: Loads that failed.
        evictions: Contents that left memory to make room.
    """

    bytes: int
    max_bytes: int
    prepared_bytes: int
    contents: int
    in_use: int
    loading: int
    waiting: int
    draining: int
    hits: int
    misses: int
    loads: int
    failures: int
    evictions: int
