"""Attaching adapters to a model, reading them back as data, and taking them off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.attachments import Attached, Attachments, attachments_of, keep, kept_by
from lorakit.attach.binding import bind, find_slot, make_slot, unbind
from lorakit.attach.merge import check_finite, merge, restore_base
from lorakit.attach.planning import (
    Key,
    Plan,
    check_beside_merged,
    check_one_formula,
    check_starts,
    companions_of,
    plan_method,
    plan_state,
)
from lorakit.attach.report import AttachReport, attach_report
from lorakit.attach.slot import AdapterParameters, Slot
from lorakit.core.adapter import AdapterSpec, AdapterState, shared_shapes
from lorakit.core.method import Method
from lorakit.core.route import OFF, Mix
from lorakit.core.selection import Selector
from lorakit.core.target import Target
from lorakit.core.walk import HOME, base_parameters, uncompiled
from lorakit.errors import (
    AdapterNameError,
    ConfigError,
    MergeError,
    RoutingError,
    TargetError,
    listing,
)
from lorakit.targets.counting import base_numel


def attach(
    model: nn.Module,
    adapter: Method | Mapping[str, Method] | Mapping[Key, Method] | AdapterState,
    targets: Selector | None = None,
    *,
    name: str = "default",
    exclude: Selector | None = None,
    freeze: bool = True,
    trainable: bool | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
) -> AttachReport:
    """Put an adapter on a model. Everything is checked before anything is touched.

    The first adapter of a model becomes its default (see `set_active`); later ones act when they are asked for. The
    model stays the user's model: no module is replaced, and base names, ties and state-dict keys do not change.

    Args:
        model: Any module.
        adapter: A method (``LoRA(r=8)``); a mapping from targets to methods, for different methods in one adapter
            (``{"all-linear": LoRA(), "score": FullFineTuning()}``; a later entry replaces an earlier one's
            choice of the same weight; a key is a preset, a name, a tuple of names, or a compiled regular expression
            for whole paths); or an `AdapterState` read from disk.
        targets: What to adapt, see `lorakit.find`; by default what the method says (``"all-linear"`` for LoRA).
        name: The adapter's name: not empty, without dots.
        exclude: What to leave out of ``targets``.
        freeze: Switch ``requires_grad`` off for the whole base; `detach` puts the flags back. ``False`` leaves them.
        trainable: Whether the adapter's parameters require a gradient: by default yes for a method, no for a state.
        dtype: Of the adapter's parameters; by default float32, or the base's where that is wider;
            a state keeps its own.
        seed: Of the initial values; by default torch's global generator is used.

    Returns:
        What was attached: targets, sizes, counts. Print it.

    Raises:
        TargetError: Something named was not found or cannot be adapted.
        AdapterNameError: The name is taken or not allowed.
        AdapterMismatchError: A state does not fit this model.
        MergeError: Adapters are merged into the weights that a new one would start from.
        ConfigError: A setting makes no sense for a target.
    """
    model = uncompiled(model)
    existing = kept_by(model)
    check_name(name, existing)
    _check_root(model, existing)
    if isinstance(adapter, AdapterState):
        if targets is not None or exclude is not None or seed is not None:
            raise TargetError(
                "An AdapterState says itself what it adapts: pass no targets, exclude or seed with it."
            )
        plan = plan_state(model, adapter)
        if existing is not None and existing.merged:
            check_beside_merged(existing, plan)
        tensors: dict[str, Mapping[str, Tensor]] = dict(adapter.tensors)
        shared = adapter.shared
        base, info = adapter.spec.base, adapter.spec.info
    else:
        if existing is not None and existing.merged:
            raise MergeError(
                f"{listing(existing.routing.merged.names)} is merged into the weights that a new adapter would start "
                "from. Call lorakit.unmerge(model) first, or merge with permanent=True."
            )
        plan = plan_method(model, adapter, targets, exclude)
        fresh = fresh_state(model, plan, seed)
        tensors, shared = dict(fresh.tensors), fresh.shared
        base, info = fresh.spec.base, {}
    spec = _spec(plan, base, info)
    train = (not isinstance(adapter, AdapterState)) if trainable is None else trainable
    keep_dtype = isinstance(adapter, AdapterState) and dtype is None
    with torch.inference_mode(False):
        parameters = {
            path: _parameters(target, method, tensors[path], dtype, keep_dtype, train)
            for path, (target, method) in plan.items()
        }
        _add_shared(parameters, plan, shared, dtype, keep_dtype, train)
    companions = companions_of(model, plan)
    check_one_formula(plan, companions)
    # Nothing has been touched so far, and nothing below can fail.
    attachments = existing if existing is not None else Attachments()
    if existing is None:
        attachments.flags = {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}
        keep(model, attachments)
    if freeze:
        _freeze(model)
    attached = Attached(spec, {})
    for path, (target, method) in plan.items():
        attached.slots[path] = _place(attachments, target, name, method, parameters[path])
    for path, target in companions:
        attached.companions.append(_place(attachments, target, name, plan[path][1], parameters[path]))
    attachments.adapters[name] = attached
    if len(attachments.adapters) == 1:
        attachments.routing.set_default(Mix.of(name))
    return attach_report(attachments, name, base_numel(model))


def extract(model: nn.Module, name: str = "default") -> AdapterState:
    """The adapter as data: a copy of its tensors, and what they are. The inverse of attaching the state.

    Raises:
        AdapterNameError: No adapter has that name.
    """
    return state_of(model, name, copy=True)


def state_of(model: nn.Module, name: str, *, copy: bool) -> AdapterState:
    """`extract`, or with ``copy=False`` the same on the live tensors, for saving."""

    def value(p: Tensor) -> Tensor:
        return p.detach().clone(memory_format=torch.contiguous_format) if copy else p.detach()

    attachments = attachments_of(model)
    tensors: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for path, adapter in attachments.parameters_of(name):
        common = adapter.method.shared_shapes()
        own = {key: p for key, p in adapter._parameters.items() if p is not None}
        tensors[path] = {key: value(p) for key, p in own.items() if key not in common}
        shared |= {key: value(own[key]) for key in common if key not in shared}
    return AdapterState(attachments.adapter(name).spec, tensors, shared)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off, or all of them; with the last one the model is as it was before the first.

    Merged weights are restored first, bit for bit; adapters that stay merged are merged again. Values,
    state-dict keys, classes, hooks and ``requires_grad`` flags are those that `attach` found.

    Raises:
        AdapterNameError: No adapter has that name.
        NotAttachedError: Nothing is attached.
        RoutingError: It is in use in an open `use` block.
        MergeError: It is merged, and a `use` block is open.
    """
    attachments = attachments_of(model)
    names = list(attachments.adapters) if name is None else [name]
    attachments.check_names(names)
    routing = attachments.routing
    busy = [n for n in names if any(n in route.names for route in routing.open_routes)]
    if busy:
        raise RoutingError(
            f"{listing(busy)} is in use by an open `with lorakit.use(...)` block (here or in another thread); "
            "detach outside of it."
        )
    stay_merged = OFF
    if any(n in routing.merged.names for n in names):
        if routing.open_scopes:
            raise MergeError(
                f"{listing(routing.merged.names)} is merged, and a `with lorakit.use(...)` block is open (here or "
                "in another thread); detach outside of it."
            )
        stay_merged = _less(routing.merged, names)
        check_finite(attachments, stay_merged)
        restore_base(attachments, model)
    if any(n in routing.default.names for n in names):
        routing.set_default(_less(routing.default, names))
    if attachments.default_before_merge is not None:
        attachments.default_before_merge = _less(attachments.default_before_merge, names)
    for gone in names:
        attached = attachments.adapters.pop(gone)
        for slot in (*attached.slots.values(), *attached.companions):
            slot._modules.pop(gone, None)
            if not slot._modules and slot in attachments.slots:
                unbind(slot)
                attachments.slots.remove(slot)
    if attachments.adapters:
        if stay_merged.weights:
            merge(model, dict(stay_merged.weights))
        return
    root = next(m for m in model.modules() if kept_by(m) is attachments)
    keep(root, None)
    for path, parameter in root.named_parameters(remove_duplicate=False):
        if path in attachments.flags:
            parameter.requires_grad_(attachments.flags[path])


def _less(mix: Mix, names: list[str]) -> Mix:
    return Mix(tuple((n, w) for n, w in mix.weights if n not in names))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimizer should get, by name: every parameter of the model that requires a gradient."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _parameters(
    target: Target,
    method: Method,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    keep_dtype: bool,
    train: bool,
) -> dict[str, nn.Parameter]:
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(f"An adapter's numbers are floating-point; got dtype={dtype}.")
    stored = target.stored
    wide = torch.promote_types(stored.dtype, torch.float32) if stored.is_floating_point() else torch.float32
    parameters = {}
    for key, tensor in tensors.items():
        value = tensor.detach().to(stored.device, tensor.dtype if keep_dtype else dtype or wide)
        value = target.arrange(method.roles.get(key, ""), value)
        # A state stays data: its tensors are never trained through the model. Nor can an inference tensor be.
        if value.data_ptr() == tensor.data_ptr() or value.is_inference():
            value = value.clone()
        parameters[key] = nn.Parameter(value, requires_grad=train and key not in method.frozen)
    return parameters


def fresh_state(
    model: nn.Module, plan: Plan, seed: int | None, info: Mapping[str, Any] | None = None
) -> AdapterState:
    """An adapter as it starts on a model, which is not touched."""
    check_starts(plan)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    shared = _start_shared(plan, generator)
    tensors = {path: method.start(target, generator, shared) for path, (target, method) in plan.items()}
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return AdapterState(_spec(plan, base, info or {}), tensors, shared)


def _spec(plan: Plan, base: str | None, info: Mapping[str, Any]) -> AdapterSpec:
    return AdapterSpec(
        {path: method for path, (_, method) in plan.items()},
        {path: target.shape for path, (target, _) in plan.items()},
        base,
        info,
    )


def _start_shared(plan: Plan, generator: torch.Generator | None) -> dict[str, Tensor]:
    """Fresh values of what all targets of the adapter share."""
    methods = {path: method for path, (_, method) in plan.items()}
    wanted = shared_shapes(methods)
    shared: dict[str, Tensor] = {}
    for method in methods.values() if wanted else ():
        if not set(method.shared_shapes()) <= set(shared):
            shared |= method.start_shared(generator)
    return shared


def _add_shared(
    parameters: Mapping[str, dict[str, nn.Parameter]],
    plan: Plan,
    shared: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    keep_dtype: bool,
    train: bool,
) -> None:
    """Give every target that shares tensors the same parameter objects, one set for each device."""
    made: dict[torch.device, dict[str, nn.Parameter]] = {}
    for path, (target, method) in plan.items():
        names = method.shared_shapes()
        if names:
            here = made.setdefault(target.stored.device, {})
            missing = {name: shared[name] for name in names if name not in here}
            here.update(_parameters(target, method, missing, dtype, keep_dtype, train))
            parameters[path].update({name: here[name] for name in names})


def _place(
    attachments: Attachments,
    target: Target,
    name: str,
    method: Method,
    parameters: Mapping[str, nn.Parameter],
) -> Slot:
    slot = find_slot(target)
    if slot is None:
        slot = make_slot(target, attachments.routing)
        bind(slot)
        attachments.slots.append(slot)
    slot.put(name, AdapterParameters(method, parameters, target.module.training))
    return slot


def _freeze(model: nn.Module) -> None:
    for _, parameter in base_parameters(model):
        parameter.requires_grad_(False)


def check_name(name: str, existing: Attachments | None) -> None:
    """Raise `AdapterNameError` for a name that is not allowed or taken."""
    if not isinstance(name, str) or not name or "." in name or "/" in name:
        raise AdapterNameError(f"An adapter's name must be a word without dots or slashes; got {name!r}.")
    if existing is not None and name in existing.adapters:
        raise AdapterNameError(
            f"An adapter called {name!r} is already attached. Choose another name, or call "
            f"lorakit.detach(model, {name!r}) first."
        )


def _check_root(model: nn.Module, existing: Attachments | None) -> None:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise TargetError(
            f"Attach to the model before it is wrapped in {type(model).__name__}: a wrapper made earlier would not "
            "keep the adapter's parameters alike on all devices."
        )
    if existing is not None:
        return
    for path, module in model.named_modules():
        if kept_by(module) is not None:
            raise AdapterNameError(
                f"Adapters were already attached to {path!r} inside this {type(model).__name__}. Attach further "
                "ones to the same module, or detach those first."
            )
        if HOME in module._modules:
            raise AdapterNameError(
                f"{path or 'This module'!r} carries adapters that were attached to a module that contains "
                "it. Attach to that one."
            )
