"""Prefixes: keys and values in front of those of an attention.

They are handed over as a cache would hand over what was read before: the attention calls ``update`` of the cache that
it was given and goes on with what comes back. So training, encoders (which have no cache), generation with any cache,
and rows with different prefixes all take the same way, and the cache itself holds real tokens only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.places import Front, PlaceSlot, front, refuse_packed
from lorakit.attach.slot import AdapterParameters
from lorakit.core.method import KeyValueMethod
from lorakit.core.walk import HOME
from lorakit.errors import RoutingError
from lorakit.targets.attention import ATTENTION, AttentionTarget
from lorakit.targets.signature import by_name

Call = dict[str, Any]


class AttentionSlot(PlaceSlot):
    """The prefixes of one attention."""

    target: AttentionTarget

    def hook(self) -> None:
        """Before the forward to hand over keys and values, and after it to see that they were taken."""
        module = self.target.module
        before = module.register_forward_pre_hook(extend_hook, with_kwargs=True)
        after = module.register_forward_hook(taken_hook, with_kwargs=True)
        self.hook_ids = (before.id, after.id)

    def extended(self, call: Call) -> Call | None:
        """The call with keys and values in front, or None when the route has none."""
        hidden: Tensor = call[self.target.arguments[0]]
        before = front(self, self.route(), hidden.shape[0], self._heads)
        if before is None:
            return None
        refuse_packed(self, call)
        if self._implementation() not in ("eager", "sdpa"):
            raise RoutingError(
                f"{self.target.path!r} runs with the attention implementation {self._implementation()!r}; a prefix "
                'needs "sdpa" or "eager": model.set_attn_implementation("sdpa").'
            )
        cache = Extended(call.get(self.target.cache), before, self.target)
        mask = self._mask(call, hidden, before, cache)
        return {**call, self.target.cache: cache, "attention_mask": mask}

    def _implementation(self) -> str:
        return getattr(getattr(self.target.module, "config", None), "_attn_implementation", None) or "eager"

    def _heads(self, adapter: AdapterParameters) -> tuple[Tensor, Tensor]:
        """Keys and values ``(length, heads, head width)``."""
        assert isinstance(adapter.method, KeyValueMethod)
        keys, values = adapter.method.keys_values(self.target, adapter._parameters)  # type: ignore[arg-type]
        size = (self.target.heads, self.target.head_width)
        return keys.unflatten(-1, size), values.unflatten(-1, size)

    def _mask(self, call: Call, hidden: Tensor, before: Front, cache: Extended) -> Tensor | None:
        """The mask of the call with columns for the keys in front."""
        given = call.get("attention_mask")
        visible = before.visible(hidden.device)
        if given is None:
            given = self._unsaid_mask(call, hidden, cache, visible is not None)
            if given is None:
                return None
        if not isinstance(given, Tensor) or given.dim() != 4:
            found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise RoutingError(
                f"{self.target.path!r} received a mask of another kind ({found}) than (rows, heads, queries, keys), "
                "and it is not known where keys in front would stand in it."
            )
        rows, heads, queries, _ = given.shape
        if visible is None:
            new = given.new_ones if given.dtype is torch.bool else given.new_zeros
            columns = new(rows, heads, queries, before.longest)
        else:
            columns = visible[:, None, None, :].expand(-1, heads, queries, -1)
            if given.dtype is not torch.bool:
                columns = torch.zeros(columns.shape, dtype=given.dtype, device=given.device).masked_fill(
                    ~columns, torch.finfo(given.dtype).min
                )
            given = given.expand(visible.shape[0], -1, -1, -1)
        return torch.cat([columns, given], dim=-1)

    def _unsaid_mask(self, call: Call, hidden: Tensor, cache: Extended, needed: bool) -> Tensor | None:
        """What no mask stands for: a token sees itself and what is before it, or in an encoder every token."""
        queries = hidden.shape[1]
        causal = call.get("is_causal")
        causal = getattr(self.target.module, "is_causal", True) if causal is None else causal
        if causal and queries > 1 and self._implementation() == "sdpa":
            # Without a mask nothing was read before, so further keys are unused room in a cache of fixed size.
            cache.room = queries
            every = torch.ones(queries, queries, dtype=torch.bool, device=hidden.device)
            return every.tril()[None, None]
        if not needed:
            return None
        keys = queries + cache.held(self.target.module)
        if self._implementation() == "eager":  # which adds its mask to the scores
            return hidden.new_zeros(1, 1, queries, keys)
        return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=hidden.device)


class Extended:
    """Stands in for the cache in one call of one attention.

    Attributes:
        cache: The real one, which holds the real tokens, or None.
        taken: Whether the attention has taken the keys and values.
        room: Keys beyond this number are unused room; None when all are used.
    """

    def __init__(self, cache: Any, before: Front, target: AttentionTarget) -> None:
        self.cache, self.before, self.target = cache, before, target
        self.taken = False
        self.room: int | None = None

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, ``(rows, heads, T, width)``, with those of the prefix in front."""
        if self.cache is not None:
            own = getattr(self.cache, "self_attention_cache", self.cache)
            key, value = own.update(key, value, *args, **kwargs)
        if self.room is not None and key.shape[2] > self.room:
            key, value = key[:, :, : self.room], value[:, :, : self.room]
        self.taken = True
        return self._in_front(self.before.tensors[0], key), self._in_front(self.before.tensors[1], value)

    def held(self, attention: nn.Module) -> int:
        """How many tokens the attention will get from the cache besides the new ones."""
        if self.cache is None:
            return 0
        number = int(attention.layer_idx)  # type: ignore[arg-type]
        seen = int(self.cache.get_seq_length(number))
        window = getattr(self.cache.layers[number], "sliding_window", None)
        return seen if window is None else min(seen, window - 1)

    def get_seq_length(self, *args: Any) -> Any:
        """How many real tokens were read before."""
        return 0 if self.cache is None else self.cache.get_seq_length(*args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__dict__.get("cache") is None:
            raise AttributeError(name)
        return getattr(self.cache, name)

    def _in_front(self, own: Tensor, tokens: Tensor) -> Tensor:
        """``own`` ``(rows or 1, length, heads, width)`` before ``tokens`` ``(rows, heads, T, width)``."""
        own = own.transpose(1, 2).to(tokens)
        if (own.shape[1], own.shape[3]) != (tokens.shape[1], tokens.shape[3]):
            raise RoutingError(
                f"{self.target.path!r} has {tokens.shape[1]} heads of width {tokens.shape[3]} here, not "
                f"{own.shape[1]} of width {own.shape[3]} as its configuration says: it cannot be extended."
            )
        return torch.cat([own.expand(tokens.shape[0], -1, -1, -1), tokens], dim=2)


def extend_hook(module: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[()], Call] | None:
    """The pre-hook of an attention; a plain function, so copies and pickles of the model work."""
    slot: Any = module._modules[HOME]._modules[ATTENTION]  # type: ignore[union-attr]
    call = slot.extended(by_name(slot.target.arguments, args, kwargs))
    return None if call is None else ((), call)


def taken_hook(module: nn.Module, args: tuple[Any, ...], kwargs: Call, output: Any) -> None:
    """Refuses an attention that never asked for what it was given: it would have run as if there were no prefix."""
    slot: Any = module._modules[HOME]._modules[ATTENTION]  # type: ignore[union-attr]
    cache = kwargs.get(slot.target.cache)
    if isinstance(cache, Extended) and not cache.taken:
        raise RoutingError(
            f"{slot.target.path!r} ({type(module).__name__}) made no use of the cache that it was given, so the prefix "
            "did not act. This attention cannot be extended: leave it out with exclude=..."
        )
