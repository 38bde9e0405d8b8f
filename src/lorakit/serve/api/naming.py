"""What the field `model` of a request means: the base, an adapter, a version of one, or a weighted mix of several.

`sql` is the newest version of the adapter, `sql@2` its second, `sql:0.7+style:0.3` the sum of both changes, each times
its number; a number that is left out is 1, and `sql:0.5` alone is half of one adapter. A mix adds the changes
themselves, not the factors, so it is exact for adapters of any ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorakit.errors import InvalidRequestError
from lorakit.serve.versions import parse_id

MOST_PARTS = 8
"""Most adapters in a mix."""

_WEIGHT = re.compile(r"[+-]?(\d{1,6}(\.\d{0,9})?|\.\d{1,9})", re.ASCII)


@dataclass(frozen=True)
class Wanted:
    """What was asked for.

    Attributes:
        text: As the client wrote it.
        name: The adapter, perhaps with a version; None for the base and for a mix.
        mix: Adapter to weight; empty if it is no mix.
    """

    text: str
    name: str | None = None
    mix: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters."""
        return (self.name,) if self.name is not None else tuple(self.mix)


def parse_model(text: str, base: str) -> Wanted:
    """Read the field `model`.

    Args:
        text: As the client wrote it.
        base: The base model's name.

    Raises:
        InvalidAdapterIdError: A name is none.
        InvalidRequestError: A mix is not written as one.
    """
    if text == base:
        return Wanted(text)
    if ":" not in text and "+" not in text:
        return Wanted(text, name=str(parse_id(text)))
    parts = text.split("+")
    if len(parts) > MOST_PARTS:
        raise InvalidRequestError(
            f"A mix has up to {MOST_PARTS} adapters; this one has {len(parts)}.", param="model"
        )
    mix: dict[str, float] = {}
    for part in parts:
        name, colon, weight = part.partition(":")
        name = str(parse_id(name.strip()))
        if colon and not _WEIGHT.fullmatch(weight.strip()):
            raise InvalidRequestError(
                f"A mix is written as 'name:0.5+other:0.5'; {weight[:40]!r} is not a plain number.",
                param="model",
            )
        if name in mix:
            raise InvalidRequestError(f"The mix names {name!r} twice; add its weights up.", param="model")
        mix[name] = float(weight) if colon else 1.0
    return Wanted(text, mix=mix)
