"""The positions of tokens, as a transformer counts them when it is not told, and how to move them up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.places import PlaceSlot, check_rows
from lorakit.core.method import KeyValueMethod
from lorakit.core.route import Mix, Route
from lorakit.core.walk import HOME
from lorakit.errors import RoutingError
from lorakit.targets.attention import CACHES, POSITIONS, PositionsTarget
from lorakit.targets.signature import by_name


class PositionSlot(PlaceSlot):
    """Moves the positions of a backbone's tokens up by the length of the prefix that its attentions see.

    It holds no adapters of its own.

    Attributes:
        attentions: The slots of the backbone's attentions.
    """

    target: PositionsTarget

    def __init__(self, target: PositionsTarget, routing: Any) -> None:
        super().__init__(target, routing)
        self.attentions: list[PlaceSlot] = []

    def hook(self) -> None:
        """Before the forward, after whatever puts vectors in front of the tokens."""
        handle = self.target.module.register_forward_pre_hook(position_hook, with_kwargs=True)
        self.hook_ids = (handle.id,)

    def shift(self, route: Route, device: torch.device) -> Tensor | int:
        """By how much the positions move under a route: a number, or one for each row ``(rows, 1)``."""
        if isinstance(route, Mix):
            return self._length(route)
        lengths = [self._length(mix) for mix in route.mixes]
        if len(set(lengths)) == 1:
            return lengths[0]
        return torch.tensor([lengths[i] for i in route.index], device=device)[:, None]

    def _length(self, mix: Mix) -> int:
        lengths = (slot.acting(mix) for slot in self.attentions)
        adapter = next((adapter for adapter in lengths if adapter is not None), None)
        if adapter is None:
            return 0
        assert isinstance(adapter.method, KeyValueMethod)
        return adapter.method.length


def position_hook(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]] | None:
    """The pre-hook of a backbone; a plain function, so copies and pickles of the model work."""
    slot: Any = module._modules[HOME]._modules[POSITIONS]  # type: ignore[union-attr]
    call = by_name(slot.target.arguments, args, kwargs) if args else kwargs  # the same one: a prompt marks it
    route, tokens = slot.route(), _tokens(call)
    check_rows(slot, route, tokens.shape[0])
    by = slot.shift(route, tokens.device)
    if isinstance(by, int) and by == 0:
        return None
    if "position_ids" in slot.target.arguments:
        longest = by if isinstance(by, int) else int(by.max())
        check_room(slot.target.room, module, call, longest)
        call["position_ids"] = moved(module, call, seen_tokens(call), by)
    return (), call


def moved(backbone: nn.Module, call: dict[str, Any], seen: Tensor | int, by: Tensor | int) -> Tensor:
    """The positions of the tokens of a call, ``(rows or 1, T)`` as a rule, each moved up.

    Args:
        backbone: The module that is called.
        call: Its arguments, by name.
        seen: How many tokens it has read before.
        by: How far: a number, or ``(rows, 1)``.
    """
    given: Tensor | None = call.get("position_ids")
    if given is not None:
        return given + by
    tokens = _tokens(call)
    padded = _padded_embeddings(backbone)
    if (
        padded is not None and call.get("input_ids") is not None
    ):  # padding takes no position, and keeps its own
        ids, padding = call["input_ids"], padded.padding_idx
        return padded.create_position_ids_from_input_ids(ids, padding) + by * ids.ne(padding)
    return (torch.arange(tokens.shape[1], device=tokens.device) + (seen + first_position(backbone)))[
        None
    ] + by


def check_room(room: int | None, backbone: nn.Module, call: dict[str, Any], longest: int) -> None:
    """Raise `RoutingError` when a text and what stands in front of it are longer than the model's learned positions."""
    if room is None or call.get("position_ids") is not None:
        return
    tokens, room = _tokens(call).shape[1], room - first_position(backbone)
    if tokens + longest > room:
        raise RoutingError(
            f"{type(backbone).__name__} has {room} positions; {longest} of them are taken by what stands in front of "
            f"the tokens, and {tokens} tokens came in. Cut the texts to {room - longest} tokens."
        )


def first_position(backbone: nn.Module) -> int:
    """The position of a row's first token: 0, or what follows the padding's own."""
    padded = _padded_embeddings(backbone)
    return 0 if padded is None else int(padded.padding_idx) + 1


def _padded_embeddings(backbone: nn.Module) -> Any:
    """The embeddings of RoBERTa and its kin, where padding has a position of its own and the tokens follow it."""
    embeddings = backbone._modules.get("embeddings")
    return embeddings if callable(getattr(embeddings, "create_position_ids_from_input_ids", None)) else None


def cache_of(call: dict[str, Any]) -> Any:
    """The cache of a call, if it has one."""
    return next((call[name] for name in CACHES if call.get(name) is not None), None)


def seen_tokens(call: dict[str, Any]) -> Tensor | int:
    """How many tokens its cache holds."""
    cache = cache_of(call)
    return 0 if cache is None else cache.get_seq_length()


def _tokens(call: dict[str, Any]) -> Tensor:
    """Ids ``(rows, T)`` or vectors ``(rows, T, width)``."""
    ids: Tensor | None = call.get("input_ids")
    return call["inputs_embeds"] if ids is None else ids
