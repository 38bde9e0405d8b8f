"""The contents that a store knows, and the names that lead to them. Pure data; the store's lock guards it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from lorakit.errors import ModelNotFoundError, listing, near_matches
from lorakit.serve.entries import AdapterEntry
from lorakit.serve.rooms import Room
from lorakit.serve.sources import Identity
from lorakit.serve.versions import AdapterId, AdapterVersion, Lease

if TYPE_CHECKING:
    from lorakit.serve.flight import Flight
    from lorakit.serve.waiters import Waiter


class Source(NamedTuple):
    """Where a content was read from.

    Attributes:
        within: The folder that its files must not lead out of; None for any.
        identity: What the files were.
    """

    within: Path | None
    identity: Identity


@dataclass(eq=False)
class Content:
    """One content, whether or not it is in memory.

    Attributes:
        digest: What it is.
        sources: Where it was read from, with what the files were then; none of a mix, which is made.
        bytes: Of its tensors.
        rank: The largest.
        targets: How many.
        methods: The methods' names.
        base: The base that its file names.
        parts: The digests of what a mix was made of.
        name: The first name that it had.
        number: Its number under that name.
        version: The tensors, while they are in memory.
        prepared: Whether they are ready to run.
        going: That it is being freed: altogether (``"evict"``), or as prepared only (``"demote"``).
        held_back: That somebody has waited for its room for so long that it is lent no more.
        flight: What is reading or preparing it.
        pending: Who came while it was being freed.
        leases: Who holds it, by serial number.
        routes: The names that lead here: ``name@1``, and aliases.
        pins: The names by which it is pinned.
        last_used: Rises with each use of any content.
        used_at: When it was last asked for.
        uses: Leases so far.
        loads: How often it was read.
    """

    digest: str
    sources: dict[Path, Source] = field(default_factory=dict)
    bytes: int = 0
    rank: int | None = None
    targets: int = 0
    methods: tuple[str, ...] = ()
    base: str | None = None
    parts: tuple[str, ...] = ()
    name: str = ""
    number: int = 0
    version: AdapterVersion | None = None
    prepared: bool = False
    going: Literal["evict", "demote"] | None = None
    held_back: bool = False
    flight: Flight | None = None
    pending: list[Waiter] = field(default_factory=list)
    leases: dict[int, Lease] = field(default_factory=dict)
    routes: set[str] = field(default_factory=set)
    pins: set[str] = field(default_factory=set)
    last_used: int = 0
    used_at: float = 0.0
    uses: int = 0
    loads: int = 0

    @property
    def ready(self) -> bool:
        """Whether it can be lent at once."""
        return self.version is not None and self.prepared and self.going is None

    @property
    def room(self) -> Room:
        """What it takes up."""
        host = self.bytes if self.version is not None else 0
        return Room(host, self.bytes if self.prepared else 0)


@dataclass
class Lineage:
    """The versions of one name.

    Attributes:
        versions: Number to content.
        implicit: Whether the name came from the store's folder and not from an explicit load: then it follows what
            lies there whenever it has to be read again.
    """

    versions: dict[int, Content]
    implicit: bool

    @property
    def newest(self) -> int:
        """The number that the bare name means."""
        return max(self.versions)


class Names:
    """Which name leads to which content.

    A number is never given twice to a name, and a name that was removed does not come back by itself.

    Attributes:
        lineages: Adapters by name.
        aliases: Further names, each for one content.
        removed: Names that were unloaded and not loaded since.
    """

    def __init__(self) -> None:
        self.lineages: dict[str, Lineage] = {}
        self.aliases: dict[str, Content] = {}
        self.removed: set[str] = set()
        self._last: dict[str, int] = {}
        self._epochs: dict[str, int] = {}

    def epoch(self, name: str) -> int:
        """Rises whenever the name is removed: what began before must not bring it back."""
        return self._epochs.get(name, 0)

    def __contains__(self, name: str) -> bool:
        return name in self.lineages or name in self.aliases

    def find(self, asked: AdapterId) -> Content | None:
        """What a name leads to."""
        if asked.name in self.aliases:
            return self.aliases[asked.name] if asked.version is None else None
        lineage = self.lineages.get(asked.name)
        if lineage is None:
            return None
        return lineage.versions.get(lineage.newest if asked.version is None else asked.version)

    def number(self, name: str, content: Content) -> int:
        """The newest number by which a name leads to a content."""
        lineage = self.lineages[name]
        return max(number for number, found in lineage.versions.items() if found is content)

    def add(self, name: str, content: Content, *, implicit: bool) -> int:
        """Let a name lead to a content, as its newest version; the number. Pins by the bare name move along."""
        lineage = self.lineages.get(name)
        self.removed.discard(name)
        if lineage is None:
            lineage = self.lineages[name] = Lineage({}, implicit)
        else:
            lineage.implicit = lineage.implicit and implicit
            newest = lineage.versions[lineage.newest]
            if newest is content:
                return lineage.newest
            _move_pin(name, newest, content)
        number = self._last[name] = self._last.get(name, 0) + 1
        lineage.versions[number] = content
        content.routes.add(f"{name}@{number}")
        if not content.name:
            content.name, content.number = name, number
            if content.version is not None:
                content.version.name, content.version.version = name, number
        return number

    def point(self, alias: str, content: Content) -> Content | None:
        """Let an alias lead to a content; what it led to before."""
        before = self.aliases.get(alias)
        self.removed.discard(alias)
        self.aliases[alias] = content
        if before is not None and before is not content:
            before.routes.discard(alias)
            _move_pin(alias, before, content)
        content.routes.add(alias)
        return before

    def known(self, asked: AdapterId) -> Content:
        """What a name leads to.

        Raises:
            ModelNotFoundError: Nothing.
        """
        content = self.find(asked)
        if content is None:
            raise self.unknown(asked)
        return content

    def remove(self, asked: AdapterId) -> list[tuple[Content, str]]:
        """Take a name away: an alias, one version, or a name with all its versions. The contents and their routes.

        Raises:
            ModelNotFoundError: There is no such name.
        """
        name = asked.name
        self.known(asked)
        if name in self.aliases:
            taken = [(self.aliases.pop(name), name)]
        else:
            lineage = self.lineages[name]
            numbers = list(lineage.versions) if asked.version is None else [asked.version]
            newest = lineage.versions[lineage.newest]
            taken = [(lineage.versions.pop(n), f"{name}@{n}") for n in numbers]
            if not lineage.versions:
                del self.lineages[name]
                newest.pins.discard(name)
            elif lineage.versions[lineage.newest] is not newest:
                _move_pin(name, newest, lineage.versions[lineage.newest])
        if name not in self:
            self.withdraw(name)
        for content, route in taken:
            content.routes.discard(route)
            content.pins.discard(route)
        return taken

    def withdraw(self, name: str) -> None:
        """Take away a name that leads nowhere yet, so that no load under way gives it a meaning."""
        self.removed.add(name)
        self._epochs[name] = self.epoch(name) + 1

    def unknown(self, asked: AdapterId, elsewhere: list[str] | None = None) -> ModelNotFoundError:
        """The error for a name that leads nowhere."""
        lineage = self.lineages.get(asked.name)
        if lineage is not None:
            there = listing([f"{asked.name}@{n}" for n in sorted(lineage.versions)])
            return ModelNotFoundError(f"There is no adapter {str(asked)!r}; of that name there is {there}.")
        hint = near_matches(asked.name, [*self.lineages, *self.aliases, *(elsewhere or [])])
        what = "was unloaded" if asked.name in self.removed else "is not known here"
        return ModelNotFoundError(f"There is no model and no adapter {str(asked)!r}: it {what}.{hint}")

    def entries(self, now: float) -> Iterator[AdapterEntry]:
        """An entry for each name."""
        for name, lineage in self.lineages.items():
            yield describe(AdapterId(name, None), lineage.versions[lineage.newest], self, now)
        for alias, content in self.aliases.items():
            yield describe(AdapterId(alias, None), content, self, now)


def describe(asked: AdapterId, content: Content, names: Names, now: float) -> AdapterEntry:
    """The entry of one name."""
    lineage = names.lineages.get(asked.name)
    numbered = sorted(route for route in content.routes if "@" in route)
    return AdapterEntry(
        name=str(asked),
        version=asked.version if lineage is None or asked.version else names.number(asked.name, content),
        alias_of=(numbered[0] if numbered else content.digest) if lineage is None else None,
        digest=content.digest,
        tier="prepared" if content.prepared else "host" if content.version is not None else "disk",
        bytes=content.bytes,
        rank=content.rank,
        targets=content.targets,
        methods=content.methods,
        pinned=bool(content.pins),
        in_use=len(content.leases),
        uses=content.uses,
        loads=content.loads,
        idle_seconds=max(0.0, now - content.used_at),
        source=str(next(reversed(content.sources))) if content.sources else None,
        base=content.base,
        versions=tuple(sorted(lineage.versions)) if lineage is not None else (),
    )


def _move_pin(name: str, old: Content, new: Content) -> None:
    if name in old.pins:
        old.pins.discard(name)
        new.pins.add(name)
