"""Binding: making a layer run its slots, and taking that back without a trace.

Most layers get a forward hook. A weight that its module reads itself is *bound*: the module's class is
replaced by a subclass with a property of the parameter's name, which reads the parameter and gives the
adapted value. The parameter stays where it was, under its own name, so ties and state-dict keys do not change
(a torch parametrization would move it), and ``isinstance`` still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.blocks import BlockSlot
from lorakit.attach.places import PlaceSlot
from lorakit.attach.positions import PositionSlot
from lorakit.attach.prefixes import AttentionSlot
from lorakit.attach.prompts import InputSlot
from lorakit.attach.routing import Routing, use_scope
from lorakit.attach.slot import OUTPUT, Slot, output_hook
from lorakit.core.route import Rows
from lorakit.core.target import Target, stock_class
from lorakit.core.walk import HOME
from lorakit.errors import RoutingError, UnsupportedTargetError
from lorakit.targets.attention import PositionsTarget

_SLOTS: dict[str, type[Slot]] = {"attention": AttentionSlot, "inputs": InputSlot, "block": BlockSlot}
_BOUND: dict[tuple[type, tuple[str, ...]], type] = {}
# Values read so far in the running forward pass of a bound module: a module that reads its experts one by
# one would
# otherwise rebuild the whole stack at every read.
_READ: ContextVar[dict[tuple[int, str], Tensor] | None] = ContextVar("lorakit_read", default=None)


def slot_key(target: Target) -> str:
    """The slot's name in ``layer.lorakit``."""
    key = OUTPUT if target.binding == "forward" else target.parameter
    return f"{key}[{target.part}]" if target.part else key


def make_slot(target: Target, routing: Routing) -> Slot:
    """A slot of the kind that the target is bound by."""
    return _SLOTS.get(target.binding, Slot)(target, routing)


def find_slot(target: Target) -> Slot | None:
    """The slot that already serves this target's layer, if any."""
    home = target.module._modules.get(HOME)
    slot = None if home is None else home._modules.get(slot_key(target))
    return slot if isinstance(slot, Slot) else None


def bind(slot: Slot) -> None:
    """Make the slot's layer run it."""
    module, key = slot.target.module, slot_key(slot.target)
    home = module._modules.get(HOME)
    if home is None:
        home = nn.Module()
        home.train(module.training)
        module._modules[HOME] = home
    slot.train(module.training)
    hooked = hooked_slots(module)
    home._modules[key] = slot
    if isinstance(slot, PlaceSlot):
        slot.hook()
        if isinstance(slot, AttentionSlot):
            _position_slot(slot).attentions.append(slot)
        return
    if slot.target.binding == "forward":  # one hook runs all slots of the layer
        if hooked:
            slot.hook_id = hooked[0].hook_id
        else:
            slot.hook_id = module.register_forward_hook(output_hook, prepend=True, with_kwargs=True).id
        return
    _rebind(module)
    reader = slot.target.reader
    if reader is not module:
        _rebind(reader)
    if isinstance(reader, nn.MultiheadAttention):
        slot.hook_id = reader.register_forward_hook(_off_the_fast_path).id


def unbind(slot: Slot) -> None:
    """Leave the layer as it was before ``bind``."""
    module, key = slot.target.module, slot_key(slot.target)
    home = module._modules[HOME]
    assert home is not None
    del home._modules[key]
    if isinstance(slot, PlaceSlot):
        _unbind_place(slot)
        return
    reader = slot.target.reader
    if slot.target.binding != "forward" or not hooked_slots(module):
        for table in (reader._forward_hooks, reader._forward_hooks_with_kwargs):
            table.pop(slot.hook_id, None)
    if not home._modules:
        del module._modules[HOME]
    if slot.target.binding != "forward":
        _rebind(module)
        if reader is not module:
            _rebind(reader)


def _unbind_place(slot: PlaceSlot) -> None:
    """The rest of ``unbind``, for a slot with hooks of its own kind."""
    slot.unhook()
    module = slot.target.module
    if isinstance(slot, AttentionSlot):
        positions = _position_slot(slot)
        positions.attentions.remove(slot)
        if not positions.attentions:
            unbind(positions)
    home = module._modules.get(HOME)
    if home is not None and not home._modules:
        del module._modules[HOME]


def _position_slot(slot: AttentionSlot) -> PositionSlot:
    """The slot that moves the positions for all attentions of a backbone; made with the first of them."""
    target = PositionsTarget(slot.target.backbone)
    found = find_slot(target)
    if not isinstance(found, PositionSlot):
        found = PositionSlot(target, slot.routing)
        bind(found)
    return found


def slots_of(module: nn.Module) -> list[Slot]:
    """The slots that live on a module: of its output, of its parameters, of slices of these."""
    home = module._modules.get(HOME)
    return [] if home is None else [slot for slot in home._modules.values() if isinstance(slot, Slot)]


def hooked_slots(module: nn.Module) -> list[Slot]:
    """Those of them that adapt the module's output."""
    return [slot for slot in slots_of(module) if slot.target.binding == "forward"]


def _bound_slots(module: nn.Module) -> list[Slot]:
    """Those of them that adapt what is read for a parameter."""
    return [slot for slot in slots_of(module) if slot.target.binding == "parameter"]


def _off_the_fast_path(module: nn.Module, args: Any, output: Any) -> None:
    """Does nothing; a layer that has a hook inside is not run by ``nn.TransformerEncoderLayer``'s fused kernel.

    That kernel reads the attention's weights without calling it, so the rows of a batch could not be told apart.
    """


def check_bindable(target: Target) -> None:
    """Refuse a module that a slot cannot live in.

    Raises:
        UnsupportedTargetError: The module iterates over its children, or keeps its weight in another form.
    """
    if isinstance(
        target.module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    ):
        raise UnsupportedTargetError(
            f"{target.path!r} belongs to a {type(target.module).__name__}, which runs every child it has, "
            "so nothing can be "
            "added to it. Put the parameter in a module of its own."
        )
    if target.binding == "parameter" and target.parameter not in target.module._parameters:
        raise UnsupportedTargetError(
            f"{target.path!r} cannot be adapted as a parameter: it is quantised (see lorakit.dequantize)."
        )


def _rebind(module: nn.Module) -> None:
    """Give the module the class that binds exactly the parameters that have slots."""
    names = tuple(sorted({slot.target.parameter for slot in _bound_slots(module)}))
    stock = stock_class(module)
    module.__class__ = bound_class(stock, names) if names or _any_slot(module) is not None else stock


def bound_class(stock: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``stock`` that binds these parameters; one class for all modules alike."""
    key = (stock, names)
    if key not in _BOUND:
        body: dict[str, Any] = {name: _bound_property(name) for name in names}
        body |= {
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
            "__doc__": stock.__doc__,
            "__reduce_ex__": _reduce,
            "_lorakit_stock_class": stock,
            "_lorakit_bound": names,
            "forward": _bound_forward(stock.forward),
        }
        _BOUND[key] = type(stock.__name__, (stock,), body)
    return _BOUND[key]


def _bound_property(name: str) -> property:
    def read(module: nn.Module) -> Any:
        base = module._parameters[name]
        home = module._modules.get(HOME)
        if base is None or home is None:
            return base
        seen = None if torch.compiler.is_compiling() else _READ.get()
        if seen is not None and (id(module), name) in seen:
            return seen[id(module), name]
        value = base
        for slot in home._modules.values():  # one for the parameter, or one for each slice of it
            if slot.target.binding == "parameter" and slot.target.parameter == name:  # type: ignore[union-attr]
                value = slot.effective(base, value)  # type: ignore[operator, union-attr]
        if seen is not None:
            seen[id(module), name] = value
        return value

    return property(read, doc=f"The parameter {name!r}, adapted under the present route.")


def _bound_forward(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return stock_forward(self, *args, **kwargs)
        slot = _any_slot(self)
        route = None if slot is None else slot.routing.current(slot.training)
        if isinstance(route, Rows):
            assert slot is not None
            return _by_rows(self, slot, route, stock_forward, args, kwargs)
        return _reading_once(stock_forward, self, args, kwargs)

    return forward


def _any_slot(module: nn.Module) -> Slot | None:
    """A slot of a weight that this module reads: one of its own parameters, or an attention's output projection."""
    for owner in (module, module._modules.get("out_proj")):
        for slot in [] if owner is None else _bound_slots(owner):
            if slot.target.reader is module:
                return slot
    return None


def _by_rows(
    module: nn.Module,
    slot: Slot,
    route: Rows,
    stock_forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run the module once per adapter on its own rows, and put the outputs together.

    The batch is dimension 0 of every tensor of that length, or dimension 1 for attention that is not
    ``batch_first``.
    """
    size = len(route.index)
    if isinstance(module, nn.MultiheadAttention):
        kwargs, args = {**dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)), **kwargs}, ()
        dim = 0 if module.batch_first else 1
        batched = kwargs["query"].dim() == 3
    else:
        dim, batched = 0, True
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if not batched or not tensors or tensors[0].dim() <= dim or tensors[0].shape[dim] != size:
        found = tuple(tensors[0].shape) if tensors else "none"
        raise RoutingError(
            f"rows names {size} rows, but {slot.target.path!r} belongs to a {stock_class(module).__name__} "
            "whose input has "
            f"size {found}: its rows cannot be told apart. Run the rows of each adapter in a call of their "
            "own."
        )
    take = _take_attention if isinstance(module, nn.MultiheadAttention) else _take
    places, back = route.places()
    pieces = []
    for (mix, _), index in zip(route.groups, places, strict=True):
        own = [take("", value, index, dim, size) for value in args]
        named = {key: take(key, value, index, dim, size) for key, value in kwargs.items()}
        with use_scope(slot.routing, mix):
            pieces.append(_reading_once(stock_forward, module, own, named))
    return _together(pieces, back, dim)


def _reading_once(
    stock_forward: Callable[..., Any], module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Run the stock forward pass with each bound value computed at most once in it."""
    token = _READ.set({})
    try:
        return stock_forward(module, *args, **kwargs)
    finally:
        _READ.reset(token)


_ATTENTION_ARGUMENTS = (
    "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal",
)  # fmt: skip


def _take(key: str, value: Any, index: Tensor, dim: int, size: int) -> Any:
    """The rows of one argument; anything that is not a tensor with the batch in front is passed on whole."""
    if not isinstance(value, Tensor) or value.dim() <= dim or value.shape[dim] != size:
        return value
    return value.index_select(dim, index.to(value.device))


def _take_attention(key: str, value: Any, index: Tensor, dim: int, size: int) -> Any:
    """The rows of one argument of ``nn.MultiheadAttention``, each with its own place for the batch."""
    if not isinstance(value, Tensor):
        return value
    index = index.to(value.device)
    if key in ("query", "key", "value"):
        return value.index_select(dim, index)
    if key == "key_padding_mask":
        return value.index_select(0, index)
    if key == "attn_mask" and value.dim() == 3:  # (rows * heads, L, S)
        return value.unflatten(0, (size, value.shape[0] // size)).index_select(0, index).flatten(0, 1)
    return value


def _together(pieces: list[Any], back: Tensor, dim: int) -> Any:
    first = pieces[0]
    if isinstance(first, Tensor):
        return torch.cat(pieces, dim).index_select(dim, back.to(first.device))
    if isinstance(first, tuple):
        # Attention returns its weights as (rows, ...), whatever the layout of its output.
        return tuple(_together([p[i] for p in pieces], back, dim if i == 0 else 0) for i in range(len(first)))
    if first is None:
        return None
    raise RoutingError(
        f"rows=... cannot put outputs of type {type(first).__name__} together; run each adapter's rows alone."
    )


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle and copy a bound module: its class is made anew from the stock class and the bound names."""
    cls: Any = type(self)
    get_state = getattr(self, "__getstate__", None)  # object has it from Python 3.11 on
    return (
        _rebuild,
        (cls._lorakit_stock_class, cls._lorakit_bound),
        get_state() if get_state else self.__dict__,
    )


def _rebuild(stock: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    return object.__new__(bound_class(stock, names))
