"""Counting a base model: its numbers, whatever they are kept in, and its bytes."""

from __future__ import annotations

from torch import Tensor, nn

from lorakit.core.walk import base_modules, base_parameters, parameters_of
from lorakit.targets.bitsandbytes_weights import matrix_numel
from lorakit.targets.quantized import packed_weight, quantized_storage


def base_numel(model: nn.Module) -> int:
    """Numbers in the base, tied ones once: for a quantised weight those of the matrix, not of the packed bytes."""
    modules = list(base_modules(model))
    shown = sum(matrix_numel(p) for _, p in parameters_of(modules))
    return shown + sum(packed_weight(m).numel for _, m in modules if quantized_storage(m) is not None)


def base_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of the base, tied ones once."""
    tensors: dict[int, Tensor] = {id(p): p for _, p in base_parameters(model)}
    tensors |= {id(b): b for _, m in base_modules(model) for b in m._buffers.values() if b is not None}
    return sum(t.numel() * t.element_size() for t in tensors.values())
