"""What is done to a model inside a ``with`` block, and undone behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in ``eval()``; its train/eval mode is put back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def with_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside the block modules run other forwards; then that of their class again, or the one that they had.

    Args:
        forwards: Each a module and what is called in place of its forward.
    """
    with ExitStack() as stack:
        for module, forward in forwards:
            stack.callback(_put_back, module, module.__dict__.get("forward"))
            module.__dict__["forward"] = forward
        yield


def _put_back(module: nn.Module, own: Callable[..., Any] | None) -> None:
    if own is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = own
