"""One load under way, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.serve.contents import Content
from lorakit.serve.rooms import Room, Ticket
from lorakit.serve.sources import Adapter, Files
from lorakit.serve.threads import Job
from lorakit.serve.versions import AdapterVersion
from lorakit.serve.waiters import Waiter


@dataclass(eq=False)
class Flight:
    """One load.

    Attributes:
        name: For messages, and for the version if its content is new.
        source: For the same.
        look_up: Finds the files, without reading them; None of a mix.
        check: Checks what can be checked before room is set aside; the bytes that reading will take.
        read: Reads them, or makes the mix.
        path: Where it looks; None of a mix.
        within: The folder that it must not lead out of; None for any.
        parts: The digests of a mix's parts.
        digest: Of a mix; None where the content tells.
        at_end: Called when it is over, without the lock.
        explicit: Whether somebody asked for this load by itself: then what failed a moment ago is tried again.
        waiters: Whom to tell.
        files: What was found.
        room: What is set aside for it.
        ticket: Its place in the queue for room.
        content: What it fills.
        version: What it has read.
        job: The step that runs.
        step: Rises with each step.
        over: Whether it has ended.
    """

    name: str
    source: str
    read: Callable[[Flight], Adapter]
    look_up: Callable[[], Files] | None = None
    check: Callable[[Files], int] | None = None
    path: Path | None = None
    within: Path | None = None
    parts: tuple[str, ...] = ()
    digest: str | None = None
    at_end: Callable[[], None] | None = None
    explicit: bool = False
    waiters: list[Waiter] = field(default_factory=list)
    files: Files | None = None
    room: Room = field(default_factory=Room)
    ticket: Ticket | None = None
    content: Content | None = None
    version: AdapterVersion | None = None
    job: Job | None = None
    running: bool = False
    step: int = 0
    over: bool = False
