"""Cross-entropy straight from what the output layer reads: logits of some tokens at a time, never of all.

With a vocabulary of 49,152 the logits of a few hundred tokens, their softmax and their gradient are the largest tensors
of a small model's step. Here a few rows of logits are made, their losses and gradients taken, and forgotten; what is
kept is the gradient of what the layer reads. The numbers are those of the whole, but for the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakit.ops.fused import cross_entropy
from lorakit.train.for_a_while import in_eval_mode
from lorakit.train.packing import NAME as PACKED
from lorakit.train.packing import pack
from lorakit.train.watched import plain_calls, watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = Callable[[Tensor], Tensor]
# Logits and their gradient: 32 MB in float32. An output layer without adapters needs no logits for its derivative, so
# the one is written over the other, and twice as many rows go through at once: the fewer rows, the more of a product is
# the reading of the weight (measured on CPU: 85 rows at 230 GFLOP/s, 170 at 260, 340 at 280).
_ENTRIES_AT_ONCE = 2**23


def head_loss(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """The sum of ``-log softmax(head(hidden))[target]``; a scalar, float32.

    Args:
        hidden: What the output layer reads, ``(n, width)``.
        head: The output layer, with whatever adapters act on it.
        targets: ``(n,)``.
    """
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    total: Tensor = _HeadLoss.apply(hidden, targets, head, torch.is_grad_enabled(), *trained)
    return total


class _HeadLoss(torch.autograd.Function):
    """The gradients are made in the forward pass, with the logits at hand, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, learning: bool, *trained: nn.Parameter
    ) -> Tensor:
        learning = learning and any(ctx.needs_input_grad)
        total = torch.zeros(
            (), dtype=torch.float64, device="cpu" if hidden.device.type == "mps" else hidden.device
        )
        gradients = [torch.zeros_like(t) for t in (hidden, *trained)] if learning else []
        in_place = _plain(head)
        entries = _ENTRIES_AT_ONCE if in_place else _ENTRIES_AT_ONCE // 2
        most = max(1, entries // getattr(head, "out_features", 2**17))
        parts = max(1, math.ceil(len(hidden) / most))
        rows = max(1, math.ceil(len(hidden) / parts))  # all of one size
        for begin in range(0, len(hidden), rows):
            some = slice(begin, begin + rows)
            done = _part_in_place(hidden[some], targets[some], head) if in_place and learning else None
            loss, found = done or _part(hidden[some], targets[some], head, trained if learning else None)
            total += loss.to(total.device)
            if learning:
                for sum_, gradient in zip([gradients[0][some], *gradients[1:]], found, strict=True):
                    if gradient is not None:
                        sum_ += gradient
        ctx.gradients = gradients
        return total.to(torch.float32).to(hidden.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_trained = (gradient * d_total.to(gradient.dtype) for gradient in ctx.gradients)
        return of_hidden, None, None, None, *of_trained


def _part(
    hidden: Tensor, targets: Tensor, head: nn.Module, trained: tuple[nn.Parameter, ...] | None
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of some rows, and the gradients of ``hidden`` and of what is trained, if that is wanted."""
    with torch.set_grad_enabled(trained is not None):
        x = hidden.detach().requires_grad_(trained is not None)
        logits = head(x)
    if trained is None:
        losses = cross_entropy(logits, targets)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") if losses is None else losses.sum()
        return loss, []
    at = [x, *trained]
    gradient = torch.empty_like(logits)
    losses = cross_entropy(logits.detach(), targets, gradient)
    if losses is not None:
        found = torch.autograd.grad(logits, at, gradient, allow_unused=True)
        return losses.sum(), list(found)
    with torch.enable_grad():
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    return loss.detach(), list(torch.autograd.grad(loss, at, allow_unused=True))


def _part_in_place(hidden: Tensor, targets: Tensor, head: Any) -> tuple[Tensor, list[Tensor | None]] | None:
    """As `_part` of a `_plain` layer, the gradient of the logits in their place; None where they are not taken."""
    logits = F.linear(hidden.detach(), head.weight, head.bias)
    losses = cross_entropy(logits, targets, logits)
    return None if losses is None else (losses.sum(), [logits @ head.weight])


def _plain(head: nn.Module) -> bool:
    """Whether an output layer is a frozen product and nothing more, of numbers that the compiled loss takes."""
    return (
        type(head) is nn.Linear
        and not any(parameter.requires_grad for parameter in head.parameters())
        and not watched(head)
        and plain_calls()
        and _taken(head.weight)
    )


def _taken(weight: Tensor) -> bool:
    """Whether the compiled loss takes numbers like these, found out with a row of them."""
    return (
        cross_entropy(weight.detach()[:1], torch.zeros(1, dtype=torch.long, device=weight.device)) is not None
    )


# ---- models whose logits are what the output layer gives, and nothing after it
def separable_head(model: PreTrainedModel) -> nn.Module | None:
    """The output layer of a model, if `head_aside` may be used with it: found out by trying, once for each model.

    Not where logits are scaled or capped after the layer, nor where its parameters are cut up over processes.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module) or any(type(p) not in _WHOLE for p in head.parameters()):
        return None
    if model not in _SEPARABLE:
        _SEPARABLE[model] = _is_separable(model, head)
    return head if _SEPARABLE[model] else None


_SEPARABLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_WHOLE = (nn.Parameter, Tensor)


@contextmanager
def head_aside(model: PreTrainedModel, head: nn.Module) -> Iterator[None]:
    """Inside a ``with`` block a model gives what its output layer would read, in place of logits."""
    parent, name = _place(model, head)
    parent._modules[name] = nn.Identity()  # not another forward: adapters are hooks of the layer
    try:
        yield
    finally:
        parent._modules[name] = head


def _place(model: nn.Module, head: nn.Module) -> tuple[nn.Module, str]:
    for name, child in model._modules.items():  # mostly here
        if child is head:
            return model, name
    return next((m, name) for m in model.modules() for name, child in m._modules.items() if child is head)


def _is_separable(model: PreTrainedModel, head: nn.Module) -> bool:
    ids = [0, 1, 2]
    batch = pack([ids]) if model.config._attn_implementation == PACKED else {"input_ids": torch.tensor([ids])}
    batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}
    try:
        with in_eval_mode(model), torch.no_grad():
            expected = model(**batch).logits
            with head_aside(model, head):
                hidden = model(**batch).logits
            return torch.equal(head(hidden), expected)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, StopIteration):
        return False
