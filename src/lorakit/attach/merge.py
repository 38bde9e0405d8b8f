"""Merging adapters into the weights, and taking them out again bit for bit.

A merge never changes a stored tensor: it puts a new one in its place and keeps the old, so that unmerging is
exact in every dtype, and a layer that is tied to the old weight keeps computing what it computed. The new
weight is summed in at least float32 and rounded once. Several adapters are each measured from the base, so
their order does not matter and the merged model computes what ``use(model, {...})`` of the same weights
computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.attach.attachments import Attachments, Merged, attachments_of
from lorakit.attach.fold import Change, bias_delta, fold
from lorakit.attach.slot import AdapterParameters, Slot
from lorakit.attach.ties import forget_ties, tie_again, untie
from lorakit.core.method import WeightMethod
from lorakit.core.route import OFF, Mix
from lorakit.core.target import Target
from lorakit.errors import MergeError, listing
from lorakit.ops import all_finite
from lorakit.targets.dense import DenseStorage


class _New(NamedTuple):
    """A weight that is ready to be put in place, in its stored layout and dtype."""

    target: Target
    value: Tensor
    bias: Tensor | None

    def changes(self) -> list[tuple[int, str]]:
        """The stored tensors that putting it in place replaces, as (module, parameter)."""
        module = id(self.target.module)
        return [(module, self.target.parameter), *([(module, "bias")] if self.bias is not None else [])]


def merge(
    model: nn.Module,
    names: str | Mapping[str, float] | Sequence[str] | None = None,
    *,
    permanent: bool = False,
) -> None:
    """Fold adapters into the weights: what is left of their cost is an empty hook a layer, or nothing if permanent.

    While adapters are merged they act everywhere, and a route that asks for something else than what is
    merged plus other additive adapters is refused. `unmerge` puts every bit back.

    Args:
        model: A model with adapters.
        names: One name, several, or ``{name: weight}``; by default what is active.
        permanent: Keep no copy of the base: the merged adapters are detached and the change cannot be undone.
            The memory
            of the old weights is freed.

    Raises:
        MergeError: Something is merged already, a `use` block is open, an adapter holds a NaN or has no
            weight form, or the
            result would overflow. The model is untouched.
        AdapterNameError: No adapter has that name.
    """
    attachments = attachments_of(model)
    routing = attachments.routing
    mix = routing.default if names is None else Mix.of(names)
    attachments.check_names(mix.names)
    if not mix.weights:
        raise MergeError("Nothing to merge: no adapter is active. Name one: lorakit.merge(model, 'name').")
    if attachments.merged:
        raise MergeError(
            f"{listing(routing.merged.names)} is merged already. Call lorakit.unmerge(model) first; to "
            "merge several, name "
            "them in one call: merge(model, ['a', 'b'])."
        )
    if routing.open_scopes:
        raise MergeError(
            "A `with lorakit.use(...)` block is open (here or in another thread); merge outside of it."
        )
    default = routing.default
    covered = all(dict(default.weights).get(name) == weight for name, weight in mix.weights)
    _check_weights(attachments, mix)
    check_finite(attachments, mix)
    with torch.inference_mode(False), torch.no_grad():
        new = _new_weights(attachments, mix)
    clash = attachments.measured_from_base(
        [name for name in default.names if covered and name not in mix.names],
        {change for item in new for change in item.changes()},
    )
    if clash:
        raise MergeError(
            f"{clash} Merge them together, or make other adapters active first (lorakit.set_active)."
        )
    attachments.default_before_merge = default
    try:
        with torch.inference_mode(False):
            for item in new:
                attachments.merged.append(_store(item))
    except BaseException:  # out of memory half-way: what was replaced so far goes back
        restore_base(attachments, model)
        raise
    untie(model, attachments)
    routing.merged = mix
    routing.set_default(default if covered else mix)
    if permanent:
        _forget(model, attachments, mix)


def unmerge(model: nn.Module) -> None:
    """Put the base weights back, bit for bit, and the default adapter that was active before the merge.

    Raises:
        MergeError: Nothing is merged.
        NotAttachedError: The model carries no adapters.
    """
    attachments = attachments_of(model)
    if not attachments.merged:
        raise MergeError("Nothing is merged into this model.")
    if attachments.routing.open_scopes:
        raise MergeError(
            "A `with lorakit.use(...)` block is open (here or in another thread); unmerge outside of it."
        )
    restore_base(attachments, model)


def restore_base(attachments: Attachments, model: nn.Module) -> None:
    """Put every replaced weight back."""
    for item in reversed(attachments.merged):
        target = item.target
        target.storage.restore(target.module, target.parameter, item.weight)
        if item.bias_changed and item.bias is None:
            target.module._parameters["bias"] = None
        elif item.bias_changed:
            DenseStorage().restore(target.module, "bias", item.bias)  # type: ignore[arg-type]
    attachments.merged.clear()
    tie_again(model, attachments)
    attachments.routing.merged = OFF
    attachments.routing.set_default(attachments.default_before_merge)
    attachments.default_before_merge = None


# ---- computing
def _by_weight(attachments: Attachments, mix: Mix) -> list[list[tuple[Slot, str, float]]]:
    """The acting (slot, adapter, weight), grouped by the stored weight that they change."""
    groups: dict[tuple[int, str], list[tuple[Slot, str, float]]] = {}
    for slot in attachments.slots:
        for name, weight in mix.weights:
            if slot.adapter(name) is not None:
                groups.setdefault((id(slot.target.module), slot.target.parameter), []).append(
                    (slot, name, weight)
                )
    return list(groups.values())


def _new_weights(attachments: Attachments, mix: Mix) -> list[_New]:
    groups = _by_weight(attachments, mix)
    # A layer's bias may be changed from two sides: by an adapter of the bias itself, and by one of the weight (LoRA
    # with a bias). What the latter adds is folded into the former where there is one.
    own_bias = {
        id(acting[0][0].target.module) for acting in groups if acting[0][0].target.parameter == "bias"
    }
    added: dict[int, Tensor] = {}
    new: dict[int, _New] = {}
    for i, acting in enumerate(groups):
        target = acting[0][0].target
        if target.parameter != "bias":
            new[i], extra = _fold(acting, mix, None)
            if extra is not None and id(target.module) in own_bias:
                added[id(target.module)] = extra
            elif extra is not None:
                new[i] = new[i]._replace(bias=_changed_bias(target, extra, mix))
    for i, acting in enumerate(groups):
        if acting[0][0].target.parameter == "bias":
            new[i], _ = _fold(acting, mix, added.get(id(acting[0][0].target.module)))
    return [new[i] for i in range(len(groups))]


def _changed_bias(target: Target, extra: Tensor, mix: Mix) -> Tensor:
    stored = target.module._parameters.get("bias")
    like = target.stored if stored is None else stored
    bias = (extra if stored is None else stored.detach() + extra).to(device=like.device)
    return _rounded(bias, like.dtype if like.is_floating_point() else bias.dtype, f"{target.path}.bias", mix)


def _rounded(value: Tensor, dtype: torch.dtype, path: str, mix: Mix) -> Tensor:
    value = value.to(dtype)
    if not all_finite(value):
        raise MergeError(
            f"Merging {listing(mix.names)} would give a NaN or an infinity in {path!r} as {dtype}; "
            "the model is untouched."
        )
    return value


def _fold(
    acting: list[tuple[Slot, str, float]], mix: Mix, added: Tensor | None
) -> tuple[_New, Tensor | None]:
    """The new value of one stored weight, with ``added`` put on top, and what its layer's bias gains."""
    first = acting[0][0].target
    stored = first.storage.load(first.module, first.parameter)
    changes: list[Change] = []
    for slot, name, weight in acting:
        target, adapter = slot.target, slot.adapter(name)
        assert isinstance(adapter, AdapterParameters)
        method = adapter.method
        assert isinstance(method, WeightMethod)
        p = {key: value.detach() for key, value in adapter._parameters.items() if value is not None}
        changes.append(Change(target, method, p, weight))
    new = torch.empty_like(stored)
    fold(stored, changes, new, added)
    return _New(first, _rounded(new, stored.dtype, first.path, mix), None), bias_delta(changes, stored.dtype)


def _check_weights(attachments: Attachments, mix: Mix) -> None:
    """Raise `MergeError` for the first adapter that is no change of a weight."""
    for name in mix.names:
        for path, adapter in attachments.parameters_of(name):
            if not isinstance(adapter.method, WeightMethod):
                where = repr(path) if path else "the model"
                raise MergeError(
                    f"{name!r} uses {type(adapter.method).__name__} at {where}, which defines no weight "
                    "and cannot be merged."
                )


def check_finite(attachments: Attachments, mix: Mix) -> None:
    """Raise `MergeError` for the first adapter that holds a NaN or an infinity."""
    for name in mix.names:
        bad = [
            f"{path}:{key}"
            for path, adapter in attachments.parameters_of(name)
            for key, p in adapter._parameters.items()
            if p is not None and not all_finite(p)
        ]
        if bad:
            raise MergeError(
                f"{name!r} holds a NaN or an infinity in {listing(bad, most=4)}; the model is untouched."
            )


# ---- putting in place
def _store(item: _New) -> Merged:
    target, module = item.target, item.target.module
    old = Merged(target, target.storage.snapshot(module, target.parameter), None, item.bias is not None)
    target.storage.store(module, target.parameter, item.value)
    if item.bias is not None:
        old.bias = module._parameters.get("bias")
        module._parameters["bias"] = nn.Parameter(item.bias, requires_grad=False)
    return old


def _forget(model: nn.Module, attachments: Attachments, mix: Mix) -> None:
    """Make the merged weights the base, and detach the adapters that are in them."""
    from lorakit.attach.attach import detach

    routing = attachments.routing
    attachments.merged.clear()
    attachments.default_before_merge = None
    forget_ties(attachments)
    routing.merged = OFF
    routing.set_default(Mix(tuple((n, w) for n, w in routing.default.weights if n not in mix.names)))
    for name in mix.names:
        detach(model, name)
