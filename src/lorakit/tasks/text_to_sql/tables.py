"""Which tables belong to which split."""

from __future__ import annotations

from typing import Literal, get_args

from lorakit.errors import ConfigError, near_matches

from .domains import business, goods, landscapes, nature, people, towns, works
from .schema import Table

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_ALL = (
    towns.TABLES
    + landscapes.TABLES
    + people.TABLES
    + works.TABLES
    + goods.TABLES
    + nature.TABLES
    + business.TABLES
)
_VALID = ("lakes", "stadium", "teacher", "paintings", "dogs")
_TEST = (
    "castles",
    "island",
    "volcanoes",
    "swimmers",
    "chef",
    "board_games",
    "podcast",
    "coffees",
    "sofa",
    "robots",
)


def tables(split: Split) -> tuple[Table, ...]:
    """The tables that the questions of a split are about; no table is in two splits.

    Raises:
        ConfigError: there is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(
            f"unknown split {split!r}: choose one of {', '.join(SPLITS)}.{near_matches(str(split), SPLITS)}"
        )
    if split == "valid":
        return tuple(table for table in _ALL if table.name in _VALID)
    if split == "test":
        return tuple(table for table in _ALL if table.name in _TEST)
    return tuple(table for table in _ALL if table.name not in _VALID + _TEST)
