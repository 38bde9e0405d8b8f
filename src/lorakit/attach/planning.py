"""Planning: what an adapter would be attached to, checked whole before anything is touched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations

from torch import nn

from lorakit.attach.attachments import Attachments
from lorakit.attach.binding import check_bindable, slot_key, slots_of
from lorakit.core.adapter import AdapterState
from lorakit.core.method import DeltaMethod, Method, WeightMethod
from lorakit.core.selection import Adapts, Selector, pattern_matches
from lorakit.core.target import Shape, Target
from lorakit.core.walk import base_modules, join
from lorakit.errors import (
    AdapterMismatchError,
    MergeError,
    TargetError,
    UnmatchedTargetError,
    UnsupportedTargetError,
    listing,
    near_matches,
)
from lorakit.targets.blocks import block_target
from lorakit.targets.find import find, without_excluded
from lorakit.targets.named_slices import slice_at
from lorakit.targets.places import PLACES
from lorakit.targets.recognise import candidates, layer_target, parameter_target

_SIDES = {"forward": "its output", "parameter": "the parameter"}
Plan = dict[str, tuple[Target, Method]]
Key = str | tuple[str, ...] | re.Pattern[str]
"""What a mapping of methods may have for a key: a preset or name, several names, or an expression for whole paths."""


def plan_method(
    model: nn.Module,
    adapter: Method | Mapping[str, Method] | Mapping[Key, Method],
    targets: Selector | None,
    exclude: Selector | None,
) -> Plan:
    """The targets that a method or a mapping of methods chooses, each with its resolved method."""
    if isinstance(adapter, Method):
        choices: list[tuple[Selector, Method]] = [
            (adapter.default_targets if targets is None else targets, adapter)
        ]
    elif isinstance(adapter, Mapping):
        if targets is not None:
            raise TargetError("A mapping names its targets in its keys: pass no targets with it.")
        choices = [(_selector(key), method) for key, method in adapter.items()]
    else:
        raise TargetError(
            "attach takes a method, a mapping from patterns to methods, or an AdapterState; got "
            f"{type(adapter).__name__}."
        )
    plan: Plan = {}
    places: dict[tuple[int, str, str], str] = {}
    for selector, method in choices:
        if not isinstance(method, Method):
            raise TargetError(
                f"{selector!r} is mapped to {method!r}, which is not a method such as LoRA(r=8)."
            )
        found = find(model, selector, exclude=exclude if len(choices) == 1 else None, adapts=method.adapts)
        _check_patterns(method, [t.path for t in found])
        for_all = method.for_targets({t.path: t.shape for t in found})
        for target in found:
            resolved = for_all.for_path(target.path)
            check_bindable(target)
            reason = resolved.supports(target)
            if reason is not None:
                raise UnsupportedTargetError(
                    f"{type(method).__name__} cannot adapt {target.path!r}: {reason}."
                )
            place = (id(target.module), target.parameter, target.part)
            earlier = places.get(place)  # the same weight, perhaps by another name: `q_proj`, `q_proj.weight`
            if earlier is not None:
                del plan[earlier]
            places[place] = target.path
            plan[target.path] = (target, resolved)
    if not plan:
        raise TargetError("The mapping is empty: it names no target to adapt.")
    if exclude is not None and len(choices) > 1:  # an exclusion holds for the mapping as a whole
        left = without_excluded({path: target for path, (target, _) in plan.items()}, exclude)
        plan = {path: plan[path] for path in left}
    return plan


def _selector(key: Key) -> Selector:
    """The choice of targets that a mapping's key means."""
    if isinstance(key, str):
        return key if key.startswith("all-") else [key]
    if isinstance(key, re.Pattern) and isinstance(key.pattern, str):
        if key.flags != re.compile(key.pattern).flags:
            raise TargetError(
                f"Write the flags of {key!r} into its text, as in '(?i)...': it is matched by that."
            )
        return key.pattern
    if isinstance(key, tuple) and all(isinstance(name, str) for name in key):
        return key
    raise TargetError(
        "A mapping's keys are presets, names of layers or parameters, tuples of names, or compiled regular "
        f"expressions; got {key!r}."
    )


def plan_state(model: nn.Module, state: AdapterState) -> Plan:
    """The places of a state in a model; every one must be there, and of the size it was made for."""
    plan: Plan = {}
    missing: list[str] = []
    for path, method in state.spec.methods.items():
        want = state.spec.shapes[path]
        target = _target_at(model, path, method.adapts)
        if isinstance(target, str):
            raise UnsupportedTargetError(f"{path!r} cannot be adapted: {target}.")
        if target is None:
            missing.append(path)
            continue
        have = target.shape
        if not _fits(want, have):
            raise AdapterMismatchError(
                f"The adapter was made for a {want.kind} target of {want} at {path!r}; this model has a {have.kind} of "
                f"{have} there. It belongs to another base model."
            )
        check_bindable(target)
        reason = method.supports(target)
        if reason is not None:
            raise UnsupportedTargetError(f"{type(method).__name__} cannot adapt {path!r}: {reason}.")
        plan[target.path] = (target, method)
    if missing:
        known = list(candidates(model))
        raise AdapterMismatchError(
            f"The adapter has {len(missing)} of {len(state.spec.methods)} targets that this {type(model).__name__} "
            f"has not: {listing(missing, most=4)}.{near_matches(missing[0], known)} It belongs to another base model, "
            "or was saved from a part or a wrapper of this one."
        )
    return plan


def _target_at(model: nn.Module, path: str, adapts: Adapts) -> Target | str | None:
    """What is adapted at a path, or the reason why it cannot be; None when there is nothing."""
    if adapts == "module":
        return block_target(model, path)
    if adapts in PLACES:
        return PLACES[adapts].at(model, path)
    target = parameter_target(model, path) if adapts == "parameter" else layer_target(model, path)
    return slice_at(model, path, adapts) if target is None else target


def check_starts(plan: Plan) -> None:
    """Refuse settings with which a fresh adapter cannot begin at its targets: asked by whoever makes or counts one.

    Raises:
        ConfigError: Such as a rank that no matrix of a target's size can have.
    """
    for target, method in plan.values():
        method.check_start(target)


def companions_of(model: nn.Module, plan: Plan) -> list[tuple[str, Target]]:
    """For methods that follow ties: the other layers that use the same stored weight."""
    followers: dict[int, list[str]] = {}
    for path, (target, method) in plan.items():
        if method.follows_ties:
            followers.setdefault(id(target.stored), []).append(path)
    found: list[tuple[str, Target]] = []
    for path, module in base_modules(model) if followers else ():
        for key, parameter in module._parameters.items():
            parameter_path = join(path, key)
            own_path = path if key == "weight" else parameter_path
            if id(parameter) not in followers or own_path in plan or parameter_path in plan:
                continue
            for source in followers[id(parameter)]:
                origin, method = plan[source]
                if origin.module is module:  # a slice of it
                    continue
                there = f"{own_path}[{origin.part}]" if origin.part else own_path
                companion = _target_at(model, there, method.adapts)
                reason = method.supports(companion) if isinstance(companion, Target) else companion
                if reason is not None or not isinstance(companion, Target):
                    raise UnsupportedTargetError(
                        f"{type(method).__name__} at {source!r} must also act at {there!r}, which uses the same "
                        f"weight, but cannot: {reason}."
                    )
                found.append((source, companion))
    return found


def check_beside_merged(existing: Attachments, plan: Plan) -> None:
    """Refuse what is measured from the base while something is merged into it."""
    for path, (_, method) in plan.items():
        if isinstance(method, WeightMethod) and not isinstance(method, DeltaMethod):
            raise MergeError(
                f"{listing(existing.routing.merged.names)} is merged, and {type(method).__name__} at {path!r} is "
                "measured from the base weights. Call lorakit.unmerge(model) first."
            )


def check_one_formula(plan: Plan, companions: list[tuple[str, Target]]) -> None:
    """Refuse to adapt one weight from two sides when one of them is not additive: the two could not be told apart.

    A layer's output is adapted by a hook, its weight by what the layer reads; and a slice of either may overlap another
    slice or the whole. Additive changes from all sides add up; but DoRA on the output rescales whatever weight the
    layer has read, and whatever another side has added.
    """
    sides: dict[tuple[int, str], list[tuple[Target, Method]]] = {}
    followed = [(target, plan[path][1]) for path, target in companions]
    for target, method in (*plan.values(), *followed):
        sides.setdefault((id(target.module), target.parameter), []).append((target, method))
    for acting in sides.values():
        target = acting[0][0]
        sided = [s for s in slots_of(target.module) if s.target.parameter == target.parameter]
        places = {slot_key(t): t for t in (*(slot.target for slot in sided), *(t for t, _ in acting))}
        if not any(a.overlaps(b) for a, b in combinations(places.values(), 2)):
            continue  # fits whatever is there; to look at it would cost more with each adapter on the model
        acting += [(slot.target, a.method) for slot in sided for a in slot._modules.values()]  # type: ignore[misc, union-attr]
        rescaled = [(t, m) for t, m in acting if t.binding == "forward" and not isinstance(m, DeltaMethod)]
        for t, odd in rescaled:
            beside = next((o for o in acting if slot_key(o[0]) != slot_key(t) and t.overlaps(o[0])), None)
            if beside is not None:
                raise UnsupportedTargetError(
                    f"The weight of {t.path!r} would be adapted through its layer's output ({type(odd).__name__}), "
                    f"which is defined on the base weight alone, and also as {beside[0].path!r} "
                    f"({type(beside[1]).__name__}, {_SIDES[beside[0].binding]}). Choose one of them."
                )


def _check_patterns(method: Method, paths: list[str]) -> None:
    for key in method.patterns():
        if not any(pattern_matches(key, path) for path in paths):
            ends = sorted({p.rsplit(".", 1)[-1] for p in paths})
            raise UnmatchedTargetError(
                f"The pattern {key!r} of {type(method).__name__} matches none of the {len(paths)} targets."
                f"{near_matches(key, ends)} Targets end in: {listing(ends)}."
            )


def _fits(want: Shape, have: Shape) -> bool:
    """Whether a place has the facts that an adapter was made for; a size of 0 means that its file does not say."""
    return (
        want.out in (0, have.out)
        and want.in_ in (0, have.in_)
        and want.batch == have.batch
        and want.lookup == have.lookup
        and want.kernel == have.kernel
    )
