"""Who waits for a content: for a lease on it, or for its being loaded under a name. Called under the store's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lorakit.errors import (
    AdapterCorruptError,
    AdapterExistsError,
    AdapterNotFoundError,
    ModelNotFoundError,
    ServeError,
)
from lorakit.serve.contents import Content, Names
from lorakit.serve.memory import Memory
from lorakit.serve.versions import AdapterId, AdapterVersion, Lease

T = TypeVar("T")


class Waiter(Protocol):
    """One who is told of the end of a load."""

    def ready(self, content: Content) -> None:
        """The content is ready to be lent."""

    def failed(self, error: ServeError) -> None:
        """It will not be."""

    def retry(self) -> None:
        """Things have changed: ask again from the start. Called without the lock."""


@dataclass(eq=False)
class LeaseWaiter:
    """A request that waits for an adapter.

    Attributes:
        future: To be given the lease.
        asked: The name; None for a mix.
        text: The name as it was written.
        holder: Whose lease it will be.
        again: Ask from the start.
        epoch: Of the name when it was asked for.
        wanted: The content that the name led to, if it led to one.
    """

    memory: Memory
    names: Names
    future: Future[Lease]
    asked: AdapterId | None
    text: str
    holder: str | None
    again: Callable[[LeaseWaiter], None]
    epoch: int = 0
    wanted: Content | None = None

    def ready(self, content: Content) -> None:
        if self.asked is not None and content is not self.names.find(self.asked):
            if (
                self.names.epoch(self.asked.name) != self.epoch
                or self.names.find(self.asked) is not self.wanted
            ):
                self.memory.after(self.retry)  # the name means something else by now
                return
            if not self._follows(self.asked):
                self.failed(self._changed(self.asked))
                return
            self.names.add(self.asked.name, content, implicit=True)
        lease = self.memory.lend(content, self.text, self.holder)
        self.memory.after(lambda: _hand_over(self.future, lease))

    def _follows(self, asked: AdapterId) -> bool:
        """Whether what lies in the folder is what the name means, and not what was once read from there."""
        lineage = self.names.lineages.get(asked.name)
        if lineage is None:
            return asked.name not in self.names.aliases and asked.version in (None, 1)
        return lineage.implicit and asked.version is None

    def _changed(self, asked: AdapterId) -> ServeError:
        if self.wanted is None:
            return self.names.unknown(asked)
        return AdapterNotFoundError(
            f"The file of {self.text!r} was changed since it was loaded, and what was loaded is no longer in memory. "
            "Load it again with if_exists='replace'.",
            param="model",
        )

    def failed(self, error: ServeError) -> None:
        mine = error.again()
        if mine.status < 500:
            mine.param = "model"
        if isinstance(mine, AdapterCorruptError):
            mine.status = 424  # the request is sound; what it depends on is not
        self.memory.after(lambda: _fail(self.future, mine))

    def retry(self) -> None:
        self.again(self)


@dataclass(eq=False)
class LoadWaiter:
    """One who loads an adapter under a name.

    Attributes:
        future: To be given the version.
        name: The name.
        pinned: Whether it is to stay in memory.
        replace: Whether the name may be taken.
        again: Load from the start.
        done: Called in any case, once.
        epoch: Of the name when the load began.
    """

    memory: Memory
    names: Names
    future: Future[AdapterVersion]
    name: str
    pinned: bool
    replace: bool
    again: Callable[[LoadWaiter], None]
    done: Callable[[], None]
    epoch: int = 0

    def ready(self, content: Content) -> None:
        if self.names.epoch(self.name) != self.epoch:
            self.failed(ModelNotFoundError(f"{self.name!r} was unloaded while it was being loaded."))
            return
        if self.name in self.names.aliases or (self.name in self.names and not self.replace):
            self.failed(name_taken(self.name))
            return
        self.names.add(self.name, content, implicit=False)
        if self.pinned:
            content.pins.add(self.name)
        self.memory.touch(content)
        self.done()
        version = content.version
        assert version is not None
        self.memory.after(lambda: _give(self.future, version))

    def failed(self, error: ServeError) -> None:
        self.done()
        self.memory.after(lambda: _fail(self.future, error.again()))

    def retry(self) -> None:
        self.again(self)


def name_taken(name: str) -> AdapterExistsError:
    """The error for a name that something else has."""
    return AdapterExistsError(
        f"There is an adapter {name!r} already. Load it under another name, unload that one, or pass "
        "if_exists='replace': requests that run keep what they have.",
        param="name",
    )


def _hand_over(future: Future[Lease], lease: Lease) -> None:
    if not _deliver(future, lease):
        lease.release()  # nobody waits for it any more


def _give(future: Future[AdapterVersion], version: AdapterVersion) -> None:
    _deliver(future, version)


def _deliver(future: Future[T], result: T) -> bool:
    try:
        if not future.set_running_or_notify_cancel():
            return False
        future.set_result(result)
    except InvalidStateError:
        return False
    return True


def _fail(future: Future[T], error: ServeError) -> None:
    try:
        if future.set_running_or_notify_cancel():
            future.set_exception(error)
    except InvalidStateError:
        return
