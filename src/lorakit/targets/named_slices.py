"""Slices by name: which targets an entry like ``"c_attn[q]"`` means in a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from lorakit.core.selection import Adapts, ends_with, split_part
from lorakit.core.target import Target
from lorakit.core.walk import base_modules, join, module_at
from lorakit.targets.layouts import parts_of
from lorakit.targets.linear import LinearTarget
from lorakit.targets.recognise import layer_target, parameter_target
from lorakit.targets.slices import slice_of


class Named(NamedTuple):
    """What is at a path: a target, or the reason why it cannot be one; and the module that it belongs to."""

    path: str
    module: nn.Module
    target: Target | str


def slices_named(model: nn.Module, entry: str, layers: Iterable[str], adapts: Adapts) -> list[Named]:
    """The slices that an entry of a list means, none when it has no brackets or names nothing.

    Args:
        model: Any module.
        entry: ``path[part]``, of which the path may be the end of one.
        layers: The paths of all layers and bare parameters.
        adapts: Whether a layer's name means its weight, or each of its parameters.
    """
    name, part = split_part(entry)
    wholes: list[str] = []
    if adapts == "parameter":
        for path, module in base_modules(model):
            own = [join(path, key) for key, p in module._parameters.items() if p is not None]
            wholes += own if ends_with(path, name) else [p for p in own if ends_with(p, name)]
    elif part:
        attentions = [p for p, m in base_modules(model) if isinstance(m, nn.MultiheadAttention)]
        wholes = [path for path in layers if ends_with(path, name)]
        wholes += [p for p in attentions if ends_with(p, name)]
    return [_named(model, path, part, adapts) for path in wholes] if part else []


def slice_at(model: nn.Module, path: str, adapts: Adapts) -> Target | str | None:
    """The slice at a path, the reason why there is none, or None when the path has no brackets or leads nowhere."""
    name, part = split_part(path)
    whole = _whole(model, name, adapts) if part else None
    return slice_of(whole, part, parts_of(model, whole)) if isinstance(whole, Target) else whole


def _named(model: nn.Module, path: str, part: str, adapts: Adapts) -> Named:
    found = slice_at(model, f"{path}[{part}]", adapts)
    assert found is not None
    if isinstance(found, Target):
        return Named(found.path, found.module, found)
    try:
        module = module_at(model, path)
    except AttributeError:
        module = module_at(model, path.rpartition(".")[0])
    return Named(f"{path}[{part}]", module, found)


def _whole(model: nn.Module, path: str, adapts: Adapts) -> Target | str | None:
    """The target that a slice is of. Output rows are meant, also where a layer stores its weight transposed."""
    if adapts != "parameter":
        return layer_target(model, path)
    owner, _, name = path.rpartition(".")
    layer = layer_target(model, owner) if name == "weight" else None
    if not isinstance(layer, LinearTarget):
        return parameter_target(model, path)
    layer.path, layer.binding = path, "parameter"
    return layer
