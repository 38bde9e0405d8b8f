"""A mapping that cannot be changed, so that a frozen dataclass that holds one can be hashed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class FixedMapping(Mapping[Key, Value], Generic[Key, Value]):
    """The entries of a mapping, in its order; equal to any mapping with the same entries.

    A method is its own configuration, and targets with equal methods are grouped, so methods must be hashable.
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[Key, Value] | None = None) -> None:
        self._entries: dict[Key, Value] = dict(entries or {})

    def __getitem__(self, key: Key) -> Value:
        return self._entries[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        return repr(self._entries)
