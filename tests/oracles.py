"""What each method should compute: one dense float64 formula a method, written apart from the package.

An oracle takes the stock layer (unadapted, float64), the name of the parameter that is adapted, the method's settings
and its tensors, and returns the *stored* values that the layer should act with. The reference output is then whatever
the stock layer's own forward makes of these values, so stride, padding, scaling and the like are torch's business.
Nothing here comes from `lorakit` but the settings, which are read as plain numbers. Everything is differentiable, so
autograd through an oracle is the reference for gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Values = dict[str, Tensor]
Oracle = Callable[[nn.Module, str, Any, Mapping[str, Tensor]], Values]


def product(module: nn.Module, parameter: str, A: Tensor, B: Tensor) -> Tensor:
    """``B A`` in the layout in which this layer stores its weight."""
    stored = module._parameters[parameter]
    assert stored is not None
    if parameter != "weight" or not isinstance(module, LAYERS):
        return _stack_product(A, B)
    if isinstance(module, nn.Linear):
        return torch.einsum("or,ri->oi", B, A)
    if isinstance(module, nn.Embedding):
        return torch.einsum("dr,rv->vd", B, A)
    if isinstance(module, CONVOLUTIONS):
        return _kernel_product(module, A, B)
    return torch.einsum("or,ri->io", B, A)  # transformers' Conv1D


def _stack_product(A: Tensor, B: Tensor) -> Tensor:
    """One matrix product for each index of the leading dimensions."""
    if A.dim() == 2:
        return torch.einsum("or,ri->oi", B, A)
    return torch.stack([_stack_product(a, b) for a, b in zip(A, B, strict=True)])


def _kernel_product(conv: nn.Module, A: Tensor, B: Tensor) -> Tensor:
    """Group by group and kernel position by kernel position: ``W[o, i, k] = sum_r B[o, r] A[r, i, k]``."""
    groups, kernel = int(conv.groups), tuple(conv.kernel_size)  # type: ignore[arg-type]
    inputs = int(conv.in_channels) // groups  # type: ignore[arg-type]
    blocks = []
    for g in range(groups):
        a, b = (A[g], B[g]) if groups > 1 else (A, B)
        a = a.reshape(a.shape[0], inputs, *kernel)
        block = torch.zeros(b.shape[0], inputs, *kernel, dtype=a.dtype)
        for position in itertools.product(*(range(k) for k in kernel)):
            at = (slice(None), slice(None), *position)
            block = block.index_put(
                tuple(_grid(block.shape, position)), torch.einsum("or,ri->oi", b, a[at]).reshape(-1)
            )
        blocks.append(block)
    return torch.cat(blocks)


def _grid(shape: torch.Size, position: tuple[int, ...]) -> list[Tensor]:
    """Indices of every (output, input) pair at one kernel position."""
    pairs = torch.cartesian_prod(torch.arange(shape[0]), torch.arange(shape[1])).reshape(-1, 2)
    return [pairs[:, 0], pairs[:, 1], *(torch.full((len(pairs),), k) for k in position)]


def lora(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """``W + s B A`` and ``b + s lora_bias``; Hu et al. 2021, Kalajdzievski 2023."""
    s = settings.alpha / {"lora": settings.r, "rslora": math.sqrt(settings.r)}[settings.scaling]
    values = {
        parameter: module._parameters[parameter] + s * product(module, parameter, p["lora_A"], p["lora_B"])
    }
    if settings.bias:
        bias = module._parameters["bias"]
        change = s * p["lora_bias"]
        values["bias"] = change if bias is None else bias + change
    return values


def dora(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """``m V / |V|`` along each output feature with the norm detached; Liu et al. 2024, section 4.3."""
    inner = ORACLES[settings.inner.name](module, parameter, settings.inner, p)
    V = inner[parameter]
    if parameter != "weight" or not isinstance(module, LAYERS):  # (..., out, in)
        norm = V.detach().square().sum(-1, keepdim=True).sqrt()
        return {parameter: p["magnitude"].reshape(norm.shape) * V / norm}
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):  # (out, everything else)
        norm = V.detach().flatten(1).square().sum(1).sqrt().reshape(-1, *(1,) * (V.dim() - 1))
        return {parameter: p["magnitude"].reshape(norm.shape) * V / norm}
    norm = V.detach().square().sum(0).sqrt()  # Embedding (vocabulary, out) and Conv1D (in, out)
    return {parameter: V * (p["magnitude"] / norm)}


def full(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """The trained value itself."""
    stored = module._parameters[parameter]
    assert stored is not None
    return {parameter: p["value"][:, 0] if stored.dim() == 1 else p["value"]}


def token_rows(module: nn.Module, parameter: str, settings: Any, p: Mapping[str, Tensor]) -> Values:
    """The vector of token ``ids[k]`` is ``rows[k]``; a stored row, but in transformers' ``Conv1D`` a column."""
    transposed = not isinstance(module, (nn.Embedding, nn.Linear))
    table = module._parameters[parameter]
    assert table is not None
    vectors = list(table.T if transposed else table)
    for k, token in enumerate(settings.ids):
        vectors[token] = p["rows"][k]
    return {parameter: torch.stack(vectors, dim=1 if transposed else 0)}


def _conv1d_of_transformers() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, nn.Embedding, *CONVOLUTIONS, _conv1d_of_transformers())
ORACLES: dict[str, Oracle] = {
    "lora": lora,
    "dora": dora,
    "full": full,
    "bitfit": full,
    "token_rows": token_rows,
}


def mixed(module: nn.Module, changes: list[tuple[float, Values]]) -> Values:
    """``W + sum_i w_i (W_i - W)`` for each stored value that any of the changes names."""
    total: Values = {}
    for weight, values in changes:
        for name, value in values.items():
            base = module._parameters[name]
            start = torch.zeros_like(value) if base is None else base
            total[name] = total.get(name, start) + weight * (value - start)
    return total


def output(model: nn.Module, path: str, values: Values, x: Tensor) -> Tensor:
    """What the stock model computes with these values in the module at ``path``."""
    module = model.get_submodule(path)
    for name in values:
        if module._parameters[name] is None:  # a bias that the layer did not have
            module._parameters[name] = nn.Parameter(torch.zeros_like(values[name]), requires_grad=False)
    return functional_call(model, {f"{path}.{name}": value for name, value in values.items()}, (x,))
