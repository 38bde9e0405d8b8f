"""Prompts: vectors in front of the embedded tokens, seen by the model and by nobody who calls it.

The hooks sit on the module that takes the tokens (``LlamaModel``, not ``LlamaForCausalLM``): what comes in gets the
vectors in front, what goes out is cut back to the tokens. So labels, losses, heads and poolers need not know. While
text is generated the cache keeps what the vectors became, and later calls put nothing in front again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.places import Front, PlaceSlot, front, refuse_packed
from lorakit.attach.positions import cache_of, check_room, first_position, moved, seen_tokens
from lorakit.attach.slot import AdapterParameters
from lorakit.core.method import InputMethod
from lorakit.core.route import Mix
from lorakit.core.walk import HOME
from lorakit.errors import RoutingError
from lorakit.targets.model import INPUTS, ModelTarget
from lorakit.targets.signature import by_name

_HOLDS = "_lorakit_prompt"


class Prompted(dict[str, Any]):
    """The arguments of a call that has a prompt.

    Attributes:
        front: The prompt.
        added: How many vectors were put in front: none where the cache holds them.
    """

    front: Front
    added: int


class InputSlot(PlaceSlot):
    """The prompts of one model."""

    target: ModelTarget

    def hook(self) -> None:
        """Around the forward, and closest to it on the way out: others see the output that the caller sees."""
        module = self.target.module
        before = module.register_forward_pre_hook(prompt_hook, prepend=True, with_kwargs=True)
        after = module.register_forward_hook(cut_hook, prepend=True, with_kwargs=True)
        self.hook_ids = (before.id, after.id)

    def prompted(self, call: dict[str, Any]) -> Prompted | None:
        """The call with the prompt in front, or None when the route has none."""
        ids, vectors = call.get("input_ids"), call.get("inputs_embeds")
        tokens = vectors if ids is None else ids
        if tokens is None:
            return None  # the model itself says what is missing
        before = front(self, self.route(), tokens.shape[0], self._vectors)
        cache = cache_of(call)
        self._check_cache(cache, before)
        if before is None:
            return None
        refuse_packed(self, call)
        self._check_mask(call, tokens, before)
        check_room(self.target.room, self.target.module, call, before.longest)
        made = Prompted(call)
        made.front = before
        if "position_ids" in self.target.arguments:
            made["position_ids"] = self._positions(call, tokens, before)
        seen = _seen(call)
        made["attention_mask"] = _mask(call.get("attention_mask"), tokens, before, seen)
        made.added = 0 if seen else before.longest
        if made.added:
            self._put_in_front(made, before, tokens)
        return made

    def has_prompt(self) -> bool:
        """Whether the route of this call has a prompt."""
        route = self.route()
        mixes = (route,) if isinstance(route, Mix) else route.mixes
        return any(self.acting(mix) is not None for mix in mixes)

    def _vectors(self, adapter: AdapterParameters) -> tuple[Tensor]:
        assert isinstance(adapter.method, InputMethod)
        return (adapter.method.vectors(self.target, adapter._parameters),)  # type: ignore[arg-type]

    def _put_in_front(self, made: Prompted, before: Front, tokens: Tensor) -> None:
        vectors = made.get("inputs_embeds")
        if vectors is None:
            vectors = self.target.embedding(made["input_ids"])
        own = before.tensors[0].to(vectors).expand(vectors.shape[0], -1, -1)
        made["inputs_embeds"], made["input_ids"] = torch.cat([own, vectors], dim=1), None
        kinds = made.get("token_type_ids")
        if kinds is not None:
            made["token_type_ids"] = torch.cat(
                [kinds.new_zeros(kinds.shape[0], before.longest), kinds], dim=1
            )

    def _positions(self, call: dict[str, Any], tokens: Tensor, before: Front) -> Tensor:
        """The positions of the tokens, moved up, after those of the vectors where these are put in front."""
        seen = _seen(call)
        shift = before.shift(tokens.device)
        own = moved(self.target.module, call, seen - before.longest if seen else 0, shift)
        if seen:
            return own
        count = torch.arange(before.longest, device=tokens.device)[None] - (before.longest - shift)
        count = (count.clamp_min(0) + first_position(self.target.module)).expand(*own.shape[:-1], -1)
        return torch.cat([count, own], dim=-1)

    def _check_cache(self, cache: Any, before: Front | None) -> None:
        """Refuse a cache that was filled without this prompt, or with another."""
        holds = getattr(cache, _HOLDS, None)
        wanted = None if before is None else before.longest
        if cache is None or holds == wanted or not int(cache.get_seq_length()):
            return
        raise RoutingError(
            f"The cache was filled {f'with a prompt of {holds} vectors' if holds else 'without a prompt'}, and this "
            f"call runs {f'with one of {wanted}' if wanted else 'without one'}. Begin with an empty cache."
        )

    def _check_mask(self, call: dict[str, Any], tokens: Tensor, before: Front) -> None:
        """Refuse what does not leave room for the prompt."""
        mask = call.get("attention_mask")
        if getattr(cache_of(call), "is_compileable", False) or (
            mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)
        ):
            raise RoutingError(
                "A prompt needs an attention mask (rows, tokens) and a cache that grows: a cache of fixed size, and a "
                "mask that was made for it, have no room for the prompt's vectors. Use the default cache."
            )
        seen = _seen(call)
        if seen and not torch.compiler.is_compiling():
            self._check_goes_on(call, tokens, seen - before.longest)

    @staticmethod
    def _check_goes_on(call: dict[str, Any], tokens: Tensor, held: int) -> None:
        """Refuse tokens that do not follow those in the cache, as far as their mask or positions tell."""
        mask, given = call.get("attention_mask"), call.get("position_ids")
        if mask is not None:
            before = mask.shape[1] - tokens.shape[1]
        elif given is not None and given.dim() == 2:
            before = int(given[0, 0])
        else:
            return
        if before != held:
            raise RoutingError(
                f"The tokens come in as those after {before} others, and the cache holds {held} (and the prompt). "
                "`generate` takes the prompt's vectors in a cache for tokens when it is to go on from it: give it the "
                "whole text and no cache."
            )


def _seen(call: dict[str, Any]) -> int:
    return int(seen_tokens(call))


def _mask(mask: Tensor | None, tokens: Tensor, before: Front, seen: int) -> Tensor | None:
    """The mask with columns for the prompt."""
    visible = before.visible(tokens.device)
    if mask is None:
        if visible is None:
            return None
        size = tokens.shape[1] + (seen - before.longest if seen else 0)
        mask = torch.ones(tokens.shape[0], size, dtype=torch.long, device=tokens.device)
    if visible is None:
        visible = mask.new_ones(mask.shape[0], before.longest)
    return torch.cat([visible.to(mask), mask], dim=1)


def prompt_hook(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], Prompted] | None:
    """The pre-hook of a model; a plain function, so copies and pickles of the model work."""
    slot: Any = module._modules[HOME]._modules[INPUTS]  # type: ignore[union-attr]
    call = slot.prompted(by_name(slot.target.arguments, args, kwargs))
    return None if call is None else ((), call)


def cut_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The forward hook of a model: cuts the output back to the tokens, and marks the cache."""
    if not isinstance(kwargs, Prompted):
        slot: Any = module._modules[HOME]._modules[INPUTS]  # type: ignore[union-attr]
        if slot.has_prompt():
            raise RoutingError(
                f"Another forward pre-hook of this {type(module).__name__} has put other arguments in place of those "
                "with the prompt, so the output cannot be cut back. Register that hook with prepend=True."
            )
        return None
    given = cache_of(kwargs)
    items = output.values() if hasattr(output, "values") else output
    for cache in (item for item in (given, *items) if hasattr(item, "get_seq_length")):
        setattr(cache, _HOLDS, kwargs.front.longest)
    return _cut_output(module, kwargs, output) if kwargs.added else None


def _cut_output(module: nn.Module, call: Prompted, output: Any) -> Any:
    longest, length = call.added, call["inputs_embeds"].shape[1]
    whole = output[0]
    fields = list(output.items()) if hasattr(output, "items") else list(enumerate(output))
    cut = {key: _cut(value, longest, length) for key, value in fields}
    first = fields[0][0]
    slot: Any = module._modules[HOME]._modules[INPUTS]  # type: ignore[union-attr]
    if slot.target.pools_first:
        cut[first] = _pooled_first(cut[first], whole, call.front)
    pooler = module._modules.get("pooler")
    place = "pooler_output" if hasattr(output, "items") else 1
    if pooler is not None and isinstance(cut.get(place), Tensor) and cut[place].dim() == 2:
        cut[place] = pooler(cut[first])
    if not hasattr(output, "items"):
        return tuple(cut.values())
    for key, value in cut.items():
        output[key] = value
    return output


def _cut(value: Any, longest: int, length: int) -> Any:
    """Hidden states ``(rows, length, width)`` and attentions ``(rows, heads, length, keys)`` of the tokens alone."""
    if isinstance(value, Tensor):
        if value.dim() == 3 and value.shape[1] == length:
            return value[:, longest:]
        if value.dim() == 4 and value.shape[2] == length:
            return value[:, :, longest:]
        return value
    if type(value) in (tuple, list):
        return tuple(_cut(item, longest, length) for item in value)
    return value


def _pooled_first(tokens: Tensor, whole: Tensor, before: Front) -> Tensor:
    """The tokens' states, with that of the prompt's first vector in the first place for those who pool that one."""
    methods = [None if adapter is None else adapter.method for adapter in before.adapters]
    takes = [isinstance(method, InputMethod) and method.pooled == "prompt" for method in methods]
    if not any(takes):
        return tokens
    lengths = before.lengths or (before.longest,) * len(takes)
    start = torch.tensor([before.longest - n for n in lengths], device=whole.device).expand(whole.shape[0])
    first = whole[torch.arange(whole.shape[0], device=whole.device), start]
    chosen = torch.tensor(takes, device=whole.device)[:, None]
    return torch.cat([torch.where(chosen, first, tokens[:, 0])[:, None], tokens[:, 1:]], dim=1)
