"""Targets that are modules as a whole: which there are of each kind, and which of them a choice means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from lorakit.core.selection import PRESETS, Selector, entry_matches, fullmatch, unmatched
from lorakit.core.target import Target
from lorakit.core.walk import module_at
from lorakit.errors import UnmatchedTargetError, listing, near_matches
from lorakit.targets.attention import attention_target, attentions
from lorakit.targets.blocks import BLOCK_PRESETS
from lorakit.targets.model import inputs, model_target


class Places(NamedTuple):
    """One kind of place.

    Attributes:
        preset: The choice of all of them.
        what: What they are called in a message.
        all: Path to target, or to the reason why it cannot be one.
        at: The same for one path; None when there is none.
    """

    preset: str
    what: str
    all: Callable[[nn.Module], Mapping[str, Target | str]]
    at: Callable[[nn.Module, str], Target | str | None]


PLACES: dict[str, Places] = {
    "attention": Places("all-attention", "attention", attentions, attention_target),
    "model": Places("all-inputs", "model input", inputs, model_target),
}
"""What `Method.adapts` names, to the places that it means."""


def check_preset(targets: Selector, adapts: str) -> None:
    """Raise `UnmatchedTargetError` for a preset of places of another kind than a method adapts."""
    if not isinstance(targets, str) or targets not in PRESETS:
        return
    own = BLOCK_PRESETS if adapts == "module" else (PLACES[adapts].preset,) if adapts in PLACES else ()
    kinds = {
        **{places.preset: places.what for places in PLACES.values()},
        **dict.fromkeys(BLOCK_PRESETS, "block"),
    }
    if targets not in own and (own or targets in kinds):
        chosen = f"each {kinds[targets]}" if targets in kinds else "layers or parameters"
        raise UnmatchedTargetError(
            f"{targets!r} chooses {chosen}, which this method does not adapt"
            f"{f': it adapts {listing(map(repr, own))}' if own else ''}."
        )


def chosen_places(model: nn.Module, targets: Selector, adapts: str) -> Iterator[tuple[str, Target | str]]:
    """Path and target, or the reason when it cannot be one.

    Raises:
        UnmatchedTargetError: Nothing, or one entry of a list, matched nothing.
    """
    places = PLACES[adapts]
    found = places.all(model)
    if not found:
        raise UnmatchedTargetError(f"{type(model).__name__} has no {places.what} that lorakit knows.")
    if isinstance(targets, str):
        matched = list(found) if targets == places.preset else fullmatch(targets, found)
        if not matched:
            hint = near_matches(targets, [places.preset])
            if entry_matches(targets, found):
                hint = f" To name places by their ending, give a list: [{targets!r}]."
            raise UnmatchedTargetError(
                f"The pattern {targets!r} matches no {places.what} of this model.{hint} For all of them there is "
                f"{places.preset!r}. It has: {listing(repr(path) for path in found)}."
            )
    elif callable(targets):
        matched = [path for path in found if targets(path, module_at(model, path))]
        if not matched:
            raise UnmatchedTargetError(f"The callable {targets!r} chose no {places.what} of {len(found)}.")
    else:
        matched = []
        for entry in targets:
            named = entry_matches(entry, found) or [p for p in found if f".{entry}." in f".{p}."]
            if not named:
                raise unmatched(entry, list(found), what=places.what)
            matched += named
    for path in dict.fromkeys(matched):
        yield path, found[path]
