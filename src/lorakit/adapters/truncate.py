"""Cutting an adapter that was trained for every rank (DyLoRA) to one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from lorakit.core.adapter import AdapterSpec, AdapterState, shared_shapes
from lorakit.core.method import Method
from lorakit.errors import ConfigError
from lorakit.methods import DoRA, DyLoRA, LoRA


def truncate(state: AdapterState, r: int) -> AdapterState:
    """The LoRA of rank ``r`` inside a DyLoRA: the first rows of ``A`` and columns of ``B``, scaled by ``alpha / r``.

    It computes what the DyLoRA computes while only these act. Being a plain LoRA it saves in PEFT's form. Targets with
    another method (a trained head) stay as they are; a DyLoRA inside a DoRA becomes a LoRA there.

    Args:
        state: An adapter with `DyLoRA` targets.
        r: From 1 to the rank that it was trained with.

    Raises:
        ConfigError: No target uses DyLoRA, or one has fewer than ``r`` directions.
    """
    spec = state.spec
    if not any(isinstance(_dynamic(method), DyLoRA) for method in spec.methods.values()):
        raise ConfigError(
            "truncate needs an adapter that was trained as DyLoRA, whose first directions are the most important ones; "
            f"this one uses {', '.join(sorted({m.name for m in spec.methods.values()}))}."
        )
    made = {path: _truncated(path, method, state.tensors[path], r) for path, method in spec.methods.items()}
    methods = {path: method for path, (method, _) in made.items()}
    shared = {name: state.shared[name] for name in shared_shapes(methods)}
    tensors = {path: tensors for path, (_, tensors) in made.items()}
    return AdapterState(AdapterSpec(methods, spec.shapes, spec.base, spec.info), tensors, shared)


def _dynamic(method: Method) -> Method:
    """The method, or what is inside a DoRA."""
    return method.inner if isinstance(method, DoRA) else method


def _truncated(
    path: str, method: Method, tensors: Mapping[str, Tensor], r: int
) -> tuple[Method, Mapping[str, Tensor]]:
    dynamic = _dynamic(method)
    if not isinstance(dynamic, DyLoRA):
        return method, tensors
    if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= dynamic.r:
        raise ConfigError(f"{path!r} was trained for the ranks 1 to {dynamic.r}; it cannot be cut to {r!r}.")
    plain = LoRA(r=r, alpha=dynamic.alpha, dropout=dynamic.dropout)
    cut = {
        **tensors,
        "lora_A": tensors["lora_A"][..., :r, :].clone(),
        "lora_B": tensors["lora_B"][..., :, :r].clone(),
    }
    return dataclasses.replace(method, inner=plain) if isinstance(method, DoRA) else plain, cut
