"""Slots of blocks: the output of a module, or of the way from one module to another, adapted from its input.

Where a block ends in another module than it begins, its input has to be carried from one to the other: per thread and
task (a context variable), never in the model; only a compiler, which knows no context variables, sees it in the slot.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lorakit.attach.places import PlaceSlot
from lorakit.attach.routing import Routing
from lorakit.errors import RoutingError
from lorakit.targets.blocks import BlockTarget

_ON_THE_WAY: ContextVar[tuple[tuple[int, Tensor], ...]] = ContextVar("lorakit_on_the_way", default=())


class BlockSlot(PlaceSlot):
    """The adapters of one block."""

    target: BlockTarget

    def __init__(self, target: BlockTarget, routing: Routing) -> None:
        super().__init__(target, routing)
        self.on_the_way: list[Tensor] = []

    def hook(self) -> None:
        """After the forward and the layer's own slots, and, where the block begins elsewhere, before that one's."""
        entry, module = self.target.entry, self.target.module
        hooks = [module.register_forward_hook(self.leave, with_kwargs=True)]
        if entry is not module:
            hooks.append(entry.register_forward_pre_hook(self.enter, with_kwargs=True))
        self.hook_ids = tuple(hook.id for hook in hooks)

    def unhook(self) -> None:
        """At both ends."""
        for number in self.hook_ids:
            self.target.entry._forward_pre_hooks.pop(number, None)
            self.target.entry._forward_pre_hooks_with_kwargs.pop(number, None)
        super().unhook()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The pre-hook of the block's first module: keep its input until the block ends."""
        if not self._acts(self.routing.current(self.training)):
            return
        x = _first(self, args, kwargs)
        if is_compiling():
            self.on_the_way.append(x)
        else:
            _ON_THE_WAY.set((*_others(self), (id(self), x)))

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The forward hook of the block's last module: its output under the route of this call.

        Raises:
            RoutingError: The block is not called with vectors of its width, or does not return such.
        """
        if not self._acts(self.route()):
            return output
        x = self._entered() if self.target.entry is not self.target.module else _first(self, args, kwargs)
        in_tuple = type(output) in (tuple, list) and bool(output)
        y = output[0] if in_tuple else output
        self._check(x, y)
        changed = self.adapt_output(x, y, seen=True)
        return type(output)((changed, *output[1:])) if in_tuple else changed

    def _entered(self) -> Tensor:
        if is_compiling():
            return self.on_the_way.pop()
        for number, x in reversed(_ON_THE_WAY.get()):
            if number == id(self):
                _ON_THE_WAY.set(_others(self))
                return x
        raise RoutingError(
            f"{self.target.path!r} ended without having begun: its last module was called, its first one was not."
        )

    def _check(self, x: Any, y: Any) -> None:
        target = self.target
        want = f"vectors of width {target.in_} to vectors of width {target.out}, by its linear layers"
        if not isinstance(y, Tensor):
            raise RoutingError(
                f"{target.path!r} maps {want}, but it returned a {type(y).__name__}; only a tensor, or a tuple that "
                "begins with one, can be adapted."
            )
        if (
            x.shape[-1] != target.in_
            or y.shape[-1] != target.out
            or (not y.is_nested and x.shape[:-1] != y.shape[:-1])
        ):
            raise RoutingError(
                f"{target.path!r} maps {want}, but it was called with {tuple(x.shape)} and returned {tuple(y.shape)}. "
                "Name its layers instead."
            )


def _first(slot: BlockSlot, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first argument of a call."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, torch.Tensor):
        raise RoutingError(
            f"{slot.target.path!r} was called with a {type(x).__name__} first; a block that can be adapted takes its "
            "vectors first. Name its layers instead."
        )
    return x


def _others(slot: BlockSlot) -> tuple[tuple[int, Tensor], ...]:
    """What is on the way to other slots."""
    return tuple((number, x) for number, x in _ON_THE_WAY.get() if number != id(slot))
