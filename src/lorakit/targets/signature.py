"""Which arguments a module's forward takes: how transformers' modules are told by what they do, not by their class."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import nn

from lorakit.core.target import stock_class


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of ``forward`` that can be given by position, without ``self``."""
    return _names(stock_class(module))  # type: ignore[arg-type]


@cache
def _names(cls: type[nn.Module]) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError, AttributeError):  # scripted, or written in C++
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, all by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
