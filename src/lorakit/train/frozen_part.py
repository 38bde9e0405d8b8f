"""The blocks of a model below its lowest adapter: what they give for a row never changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.attach.attachments import attachments_of
from lorakit.attach.slot import Slot
from lorakit.errors import ConfigError, listing
from lorakit.train.for_a_while import with_forwards
from lorakit.train.loss import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAVE_OUT = "Leave train.cache_frozen out."
Batch = Mapping[str, Tensor]


class _Reached(Exception):  # noqa: N818 - no error: the frozen blocks have run, and nothing behind them is wanted
    """Ends a forward pass early."""


@dataclass(frozen=True)
class FrozenPart:
    """The blocks below the lowest adapter.

    Attributes:
        path: Of the list of blocks, as ``model.layers``.
        blocks: Those below the lowest adapter, in their order; at least one.
        total: How many blocks the list has.
        in_tuple: Whether a block returns its vectors in a tuple.
    """

    path: str
    blocks: tuple[nn.Module, ...]
    total: int
    in_tuple: bool = False

    def giving(self, hidden: Tensor) -> AbstractContextManager[None]:
        """Inside the block nothing of it is run; its last block gives ``hidden`` ``(B, T, d)``.

        Backward belongs inside too, where activations are checkpointed.
        """

        def give(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self.in_tuple else hidden

        return with_forwards((block, give) for block in self.blocks)


def examine(model: PreTrainedModel, batch: Batch, objective: Objective) -> tuple[FrozenPart, Tensor]:
    """Find the frozen part, and run a batch through it in train mode.

    Returns:
        The part, and what it gives for the batch, ``(B, T, d)``.

    Raises:
        ConfigError: There is none, or what it gives may be another each time.
    """
    part = frozen_part(model)
    with torch.no_grad():
        objective.summed(model, model, batch)  # what a loss looks up about a model once is looked up here
    outside = [slot for slot in _slots(model) if not slot.target.path.startswith(f"{part.path}.")]
    dropouts = [
        (path, module)
        for path, module in model.named_modules()
        if "Dropout" in type(module).__name__ and getattr(module, "p", None)
    ]
    called: list[str] = []
    watched = [*((slot.target.path, slot.target.module) for slot in outside), *dropouts]
    hooks = [module.register_forward_pre_hook(_noting(called, path)) for path, module in watched]
    was_training, device = model.training, next(model.parameters()).device
    before = _random_states(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train()
        try:
            with torch.no_grad():
                output = run_to_its_end(part, model, batch, objective)
            drawn = _random_states(device) != before
        finally:
            model.train(was_training)
            for hook in hooks:
                hook.remove()
    below = [slot.target.path for slot in outside if slot.target.path in called]
    if below:
        raise ConfigError(
            f"train.cache_frozen keeps what lies below the lowest adapter, and {listing(below, most=3) or 'the model'} "
            f"is adapted, before {part.path}. Take it out of adapter.targets, or leave train.cache_frozen out."
        )
    if drawn:
        culprits = [path for path, _ in dropouts if path in called]
        raise ConfigError(
            "train.cache_frozen keeps what the frozen part gives, and numbers are drawn at random there: "
            f"{listing(culprits, most=3) or 'dropout in the attention'}. Set dropout to 0 in the model's config, or "
            "leave train.cache_frozen out."
        )
    in_tuple = isinstance(output, tuple) and len(output) == 1
    hidden = output[0] if isinstance(output, tuple) and in_tuple else output
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise ConfigError(
            f"train.cache_frozen keeps what a block gives where that is one tensor of vectors; those of {part.path} "
            f"give more. {LEAVE_OUT}"
        )
    return replace(part, in_tuple=in_tuple), hidden


def frozen_part(model: nn.Module) -> FrozenPart:
    """The blocks below the lowest one that is adapted.

    Raises:
        ConfigError: There is no list of blocks, there are several that are adapted, or the first block is.
    """
    lists = block_lists(model)
    paths = [slot.target.path for slot in _slots(model)]
    adapted = [path for path in lists if any(own.startswith(f"{path}.") for own in paths)]
    if len(adapted) > 1:
        raise ConfigError(
            "train.cache_frozen needs one list of blocks that is adapted from some block on; here adapters lie in "
            f"{listing(adapted)}. {LEAVE_OUT}"
        )
    path = adapted[0] if adapted else max(lists, key=lambda name: len(lists[name]), default="")
    if not path:
        raise ConfigError(
            f"train.cache_frozen needs a model with a list of blocks; {type(model).__name__} has none. {LEAVE_OUT}"
        )
    blocks = lists[path]
    lowest = lowest_block(path, paths, len(blocks))
    if not lowest:
        raise ConfigError(
            f"train.cache_frozen keeps what lies below the lowest adapter, and there is one in the first block, "
            f"{path}.0. Adapt upper blocks only, as with adapter.targets: '{upper_blocks(path, len(blocks))}', or "
            "leave train.cache_frozen out."
        )
    return FrozenPart(path, tuple(blocks[:lowest]), len(blocks))


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules of a model, by their paths."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not any(part.isdigit() for part in path.split("."))
    }


def lowest_block(path: str, targets: Iterable[str], total: int) -> int:
    """The number of the lowest block of a list in which a target lies; ``total`` where none does."""
    inside = (own[len(path) + 1 :] for own in targets if own.startswith(f"{path}."))
    return min((int(own.split(".")[0]) for own in inside), default=total)


def upper_blocks(path: str, total: int) -> str:
    """A pattern for the linear layers of the upper half of a list of blocks, as ``adapter.targets`` takes it."""
    numbers = "|".join(str(number) for number in range(total - max(1, total // 2), total))
    return f"{re.escape(path)}[.]({numbers})[.].*"


def _slots(model: nn.Module) -> list[Slot]:
    return attachments_of(model).slots


def _noting(called: list[str], path: str) -> Callable[[nn.Module, Any], None]:
    def note(module: nn.Module, args: Any) -> None:
        called.append(path)

    return note


def _random_states(device: torch.device) -> list[bytes]:
    """The random states that a forward pass on a device can change."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return [state.numpy().tobytes() for state in states]


def run_to_its_end(part: FrozenPart, model: PreTrainedModel, batch: Batch, objective: Objective) -> Any:
    """What the last block of the frozen part gives for a batch; nothing behind it is run."""
    outputs: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise _Reached

    handle = part.blocks[-1].register_forward_hook(stop)
    try:
        objective.summed(model, model, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return outputs[0] if outputs else None
