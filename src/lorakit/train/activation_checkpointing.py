"""Whether the layers of a model are run again in the backward pass, in place of keeping what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from lorakit.attach import checkpoint_contexts
from lorakit.errors import LorakitError
from lorakit.train.free_space import memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorakit.plan import Plan

Checkpointing = bool | Literal["auto"]
_USABLE = 0.9  # of what is free: other programs live too, and a plan is an estimate


def wants_checkpointing(
    asked: Checkpointing, plan: Callable[[], Plan], device: torch.device, say: Callable[[str], None]
) -> bool:
    """What ``train.activation_checkpointing`` comes to.

    Args:
        asked: From the recipe; ``"auto"`` is where a step without it would not fit into the memory that is free.
        plan: Tells what a step without it needs; asked for ``"auto"`` alone.
        device: Where the model is.
        say: Is told what ``"auto"`` came to, and why.
    """
    if asked != "auto":
        return asked
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory()[1]
    try:
        training = plan().training
    except LorakitError as error:
        say(f"activation checkpointing is off: what a step needs is not known ({error})")
        return False
    if training is None or not free:
        say("activation checkpointing is off: what a step needs, or what memory is free, is not known")
        return False
    wanted = training.above_weights > _USABLE * free
    say(
        f"activation checkpointing is {'on' if wanted else 'off'}: a step without it needs about "
        f"{training.above_weights / 1e9:.1f} GB beside the weights, and {free / 1e9:.1f} GB are free"
    )
    return wanted


def checkpoint_activations(model: PreTrainedModel, wanted: bool) -> None:
    """Switch transformers' activation checkpointing on or off; the re-run in backward takes the same adapters."""
    word = (
        "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    )  # renamed in transformers 5
    if not wanted:
        getattr(model, f"{word}_checkpointing_disable")()
        return
    asked = getattr(model, "_require_grads_hook", None) is not None
    options = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": options})
    if not asked and getattr(model, "_require_grads_hook", None) is not None:
        # transformers makes the inputs require a gradient along with it, for the reentrant kind alone, and never takes
        # that back: backward would go down to the first layer, where it should end at the lowest adapter.
        model.disable_input_require_grads()
