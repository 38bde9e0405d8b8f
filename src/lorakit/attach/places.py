"""Slots of places that are not one layer: an attention, a model's input. What they put in front of a batch's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lorakit.attach.slot import AdapterParameters, Slot
from lorakit.core.route import Mix, Route
from lorakit.errors import RoutingError, listing


class PlaceSlot(Slot):
    """A slot that acts before and after its module's forward, and not on one tensor.

    Attributes:
        hook_ids: The numbers of its hooks on the module.
    """

    hook_ids: tuple[int, ...] = ()

    def hook(self) -> None:
        """Put the hooks on the module."""
        raise NotImplementedError

    def unhook(self) -> None:
        """Take them off."""
        module = self.target.module
        for number in self.hook_ids:
            for table in (
                module._forward_pre_hooks,
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                table.pop(number, None)
        self.hook_ids = ()

    def route(self) -> Route:
        """The route of a call that has arrived here."""
        if not self.ran and not torch.compiler.is_compiling():
            self.ran = True
        return self.routing.current(self.training)

    def acting(self, mix: Mix) -> AdapterParameters | None:
        """The one adapter of a mix that has parameters here.

        Raises:
            RoutingError: There are several, or it is not there with weight one.
        """
        here = [(name, weight) for name, weight in mix.weights if weight and name in self._modules]
        if not here:
            return None
        if len(here) > 1 or here[0][1] != 1:
            asked = listing(f"{weight:g} * {name}" for name, weight in here)
            raise RoutingError(
                f"{asked} cannot act on {_words(self)}: what stands in front of the tokens is there or is not, and has "
                "no half and no sum. Use one such adapter at a time, with weight 1; adapters of other kinds may act "
                "beside it."
            )
        return self.adapter(here[0][0])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # In a new process torch counts its hooks from 0: it must not give these numbers to other hooks.
        RemovableHandle.next_id = max(RemovableHandle.next_id, *(n + 1 for n in self.hook_ids), 0)


class Front(NamedTuple):
    """What stands in front of the tokens of a batch.

    Attributes:
        tensors: Each ``(rows, longest, ...)``, or ``(1, longest, ...)`` where it is the same for all rows. A row with
            fewer has them at the end, next to its tokens, and zeros before.
        longest: The most that a row has.
        lengths: How many each row has; None where all have the same number.
        adapters: For each row, or for all of them, whose they are.
    """

    tensors: tuple[Tensor, ...]
    longest: int
    lengths: tuple[int, ...] | None
    adapters: tuple[AdapterParameters | None, ...]

    def visible(self, device: torch.device) -> Tensor | None:
        """Which of the columns a row really has, ``(rows, longest)``; None where that is all of them."""
        if self.lengths is None:
            return None
        start = self.longest - torch.tensor(self.lengths, device=device)
        return torch.arange(self.longest, device=device) >= start[:, None]

    def shift(self, device: torch.device) -> Tensor | int:
        """By how much the positions of the tokens move up: a number, or ``(rows, 1)``."""
        return self.longest if self.lengths is None else torch.tensor(self.lengths, device=device)[:, None]


def front(
    slot: PlaceSlot, route: Route, rows: int, make: Callable[[AdapterParameters], tuple[Tensor, ...]]
) -> Front | None:
    """What the route puts in front of a batch here, or None when that is nothing.

    Args:
        slot: The place.
        route: The route of the call.
        rows: Rows of the batch.
        make: The tensors of an adapter, each ``(length, ...)``.

    Raises:
        RoutingError: The route names another number of rows, or mixes what cannot be mixed.
    """
    if isinstance(route, Mix):
        adapter = slot.acting(route)
        if adapter is None:
            return None
        tensors = tuple(tensor.unsqueeze(0) for tensor in make(adapter))
        return Front(tensors, tensors[0].shape[1], None, (adapter,))
    check_rows(slot, route, rows)
    adapters = [slot.acting(mix) for mix in route.mixes]
    made = {id(adapter): make(adapter) for adapter in adapters if adapter is not None}
    if not made:
        return None
    parts = [None if adapter is None else made[id(adapter)] for adapter in adapters]
    sizes = [0 if part is None else part[0].shape[0] for part in parts]
    longest = max(sizes)
    some = next(part for part in parts if part is not None)
    index = torch.tensor(route.index, device=some[0].device)
    stacked: list[Tensor] = []
    for i, like in enumerate(some):
        nothing = like.new_zeros(longest, *like.shape[1:])
        stack = [nothing if part is None else _padded(part[i], longest) for part in parts]
        stacked.append(torch.stack(stack).index_select(0, index))
    lengths = None if len(set(sizes)) == 1 else tuple(sizes[i] for i in route.index)
    return Front(tuple(stacked), longest, lengths, tuple(adapters[i] for i in route.index))


def check_rows(slot: PlaceSlot, route: Route, rows: int) -> None:
    """Raise `RoutingError` when the route names another number of rows than the batch has."""
    if not isinstance(route, Mix) and len(route.index) != rows:
        raise RoutingError(
            f"rows names {len(route.index)} rows, but {_words(slot)} received {rows}: give one entry per row of the "
            "batch, after any repetition by beams. (What stands in front of a row belongs to all of its tokens, so a "
            "packed row cannot have one for each token.)"
        )


def refuse_packed(slot: PlaceSlot, call: dict[str, Any]) -> None:
    """Raise `RoutingError` for documents laid end to end in one row."""
    if call.get("cu_seq_lens_q") is not None:
        raise RoutingError(
            f"{_words(slot)} received documents packed into one row, and each of them would need what stands in front "
            "of its own. Pad them instead (train.batching: padded)."
        )


def _padded(tensor: Tensor, length: int) -> Tensor:
    return F.pad(tensor, (*(0, 0) * (tensor.dim() - 1), length - tensor.shape[0], 0))


def _words(slot: PlaceSlot) -> str:
    return repr(slot.target.path) if slot.target.path else "the model's input"
