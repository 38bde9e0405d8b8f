"""Counts that papers and read-me files print, beside those counted here; where the two differ, why.

The claims are data (``published.json``): what was adapted, what was printed, and the exact count. The tests count every
one of them again, and the table in the documentation is made of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from lorakit.attach.planning import Key
from lorakit.core.method import Method
from lorakit.core.registry import method_from_json
from lorakit.plan.architectures import Architecture, architecture
from lorakit.plan.counting import count


@dataclass(frozen=True)
class Claim:
    """One printed figure.

    Attributes:
        setting: What was adapted, and how.
        source: Who printed it.
        model: A shipped config.
        adapter: Pairs of a choice of targets and a method, both as JSON.
        printed: The figure as it stands there.
        what: ``"trainable"`` or ``"total"`` (with the base).
        count: The exact figure.
        agrees: Whether the printed one is it, allowing for rounding.
        why: What is behind a difference, or how the two relate.
        task: Of the model; None for what its config says.
        num_labels: Of a fresh head.
    """

    setting: str
    source: str
    model: str
    adapter: list[list[Any]]
    printed: str
    what: str
    count: int
    agrees: bool
    why: str
    task: str | None = None
    num_labels: int | None = None

    def methods(self) -> dict[Key, Method]:
        """The adapter as `lorakit.attach` takes it."""
        return {_key(choice): method_from_json(method) for choice, method in self.adapter}


@dataclass(frozen=True)
class Checked:
    """A claim that was counted again.

    Attributes:
        claim: The claim.
        counted: What was counted now.
    """

    claim: Claim
    counted: int

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self.claim), "counted": self.counted}


def claims() -> list[Claim]:
    """All claims, in the order of the table."""
    text = files("lorakit.plan").joinpath("published.json").read_text(encoding="utf-8")
    return [Claim(**claim) for claim in json.loads(text)]


def recount(claim: Claim) -> int:
    """The figure of a claim, counted from the config."""
    counts = count(_model(claim.model, claim.task, claim.num_labels).model, claim.methods())
    return counts.trainable if claim.what == "trainable" else counts.total


def check_published() -> list[Checked]:
    """Every claim, counted again."""
    return [Checked(claim, recount(claim)) for claim in claims()]


def table() -> Iterator[str]:
    """The lines of the table in the documentation."""
    yield "| setting | source | published | counted | agrees |"
    yield "|---|---|---:|---:|---|"
    for claim in claims():
        verdict = ("yes" if claim.agrees else "**no**") + (f": {claim.why}" if claim.why else "")
        yield f"| {claim.setting} | {claim.source} | {claim.printed} | {claim.count:,} | {verdict} |"


@cache
def _model(name: str, task: str | None, num_labels: int | None) -> Architecture:
    return architecture(name, task=task, num_labels=num_labels)  # type: ignore[arg-type]


def _key(choice: Any) -> Key:
    if isinstance(choice, dict):
        return re.compile(choice["regex"])
    return tuple(choice) if isinstance(choice, list) else str(choice)
