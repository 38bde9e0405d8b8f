"""What is attached to a model: its slots, its adapters, and what has to be put back."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lorakit.attach.routing import Routing
from lorakit.attach.slot import AdapterParameters, Slot
from lorakit.core.adapter import AdapterSpec
from lorakit.core.method import DeltaMethod
from lorakit.core.target import Target
from lorakit.core.walk import HOME, base_modules
from lorakit.errors import AdapterNameError, NotAttachedError, RoutingError, listing, near_matches

_KEPT = "_lorakit"


@dataclass
class Attached:
    """One adapter on a model.

    Attributes:
        spec: What it is.
        slots: Target path to the slot that holds its parameters.
        companions: Slots that share the parameters of another, where a weight is tied.
    """

    spec: AdapterSpec
    slots: dict[str, Slot]
    companions: list[Slot] = field(default_factory=list)


@dataclass
class Merged:
    """One stored weight that was replaced by a merge."""

    target: Target
    weight: Any
    bias: Tensor | None
    bias_changed: bool


@dataclass
class Attachments:
    """Everything lorakit keeps about one model: on the model's root, copied and pickled with it."""

    routing: Routing = field(default_factory=Routing)
    adapters: dict[str, Attached] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    flags: dict[str, bool] = field(default_factory=dict)
    merged: list[Merged] = field(default_factory=list)
    default_before_merge: Any = None
    ties: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)
    ties_broken: bool = False

    def adapter(self, name: str) -> Attached:
        """The adapter of that name.

        Raises:
            AdapterNameError: There is none.
        """
        try:
            return self.adapters[name]
        except KeyError:
            raise AdapterNameError(
                f"No adapter is called {name!r}.{near_matches(name, self.adapters)} Attached: "
                f"{listing(self.adapters)}."
            ) from None

    def check_names(self, names: Iterable[str]) -> None:
        """Raise `AdapterNameError` for the first name that is not attached."""
        for name in names:
            if name not in self.adapters:
                self.adapter(name)

    def measured_from_base(self, names: Iterable[str], changed: Container[tuple[int, str]]) -> str | None:
        """Why these adapters cannot run beside a merge that has ``changed`` some weights; None when they can.

        An additive change may be added to any weight; a method like DoRA is defined on the base weight itself.
        """
        for name in names:
            attached = self.adapter(name)
            for slot in (*attached.slots.values(), *attached.companions):
                adapter = slot.adapter(name)
                if adapter is None or isinstance(adapter.method, DeltaMethod):
                    continue
                if (id(slot.target.module), slot.target.parameter) in changed:
                    return (
                        f"{name!r} ({type(adapter.method).__name__}) is measured from the base weight of "
                        f"{slot.target.path!r}, so it cannot act on top of a merge that changes that weight."
                    )
        return None

    def check_beside_merged(self, names: Iterable[str]) -> None:
        """Raise `RoutingError` when one of these adapters cannot run beside what is merged."""
        rest = [name for name in names if name not in self.routing.merged.names]
        if self.merged and rest:
            changed = {(id(item.target.module), item.target.parameter) for item in self.merged}
            changed |= {(id(item.target.module), "bias") for item in self.merged if item.bias_changed}
            reason = self.measured_from_base(rest, changed)
            if reason:
                raise RoutingError(f"{reason} Call lorakit.unmerge(model) first.")

    def parameters_of(self, name: str) -> Iterable[tuple[str, AdapterParameters]]:
        """Target path and parameters of one adapter."""
        for path, slot in self.adapter(name).slots.items():
            adapter = slot.adapter(name)
            assert adapter is not None
            yield path, adapter


def kept_by(model: nn.Module) -> Attachments | None:
    """What is attached to exactly this module as a root."""
    return model.__dict__.get(_KEPT)


def keep(model: nn.Module, attachments: Attachments | None) -> None:
    """Put the record on the root, or take it away."""
    if attachments is None:
        model.__dict__.pop(_KEPT, None)
    else:
        model.__dict__[_KEPT] = attachments


def root_of(model: nn.Module) -> nn.Module:
    """The module that adapters were attached to: the model itself, or what a wrapper made afterwards holds.

    Raises:
        NotAttachedError: Nothing is attached.
    """
    kept = attachments_of(model)
    return next(module for _, module in base_modules(model) if kept_by(module) is kept)


def attachments_of(model: nn.Module) -> Attachments:
    """What is attached to a model, also when the model was wrapped (DDP, ``torch.compile``) afterwards.

    Raises:
        NotAttachedError: Nothing is.
    """
    own = kept_by(model)
    if own is not None:
        return own
    inside = {id(a): (path, a) for path, m in model.named_modules() if (a := kept_by(m)) is not None}
    if len(inside) == 1:
        return next(iter(inside.values()))[1]
    if inside:
        raise NotAttachedError(
            f"Several modules inside carry adapters: {listing(p for p, _ in inside.values())}. Pass one of "
            "these."
        )
    if any(HOME in path.split(".") for path, _ in model.named_modules()):
        raise NotAttachedError(
            "The adapters here were attached to a module that contains this one; pass that module (the one "
            "given to attach)."
        )
    raise NotAttachedError(
        f"This {type(model).__name__} carries no adapters. Call lorakit.attach or lorakit.load first."
    )
