"""An adapter at another rank: a number, a share of the energy, or a size in bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.adapters.change import (
    as_lora,
    bias_change,
    dense_change,
    low_rank_change,
    numel_of_direction,
    require_finite,
    widest_dtype,
    without_magnitude,
)
from lorakit.adapters.fit import Cut, Fitted, Residual, split
from lorakit.core import AdapterSpec, AdapterState, DeltaMethod, LowRankMethod
from lorakit.core.adapter import shared_shapes
from lorakit.core.method import Method
from lorakit.errors import ConfigError
from lorakit.methods import DoRA
from lorakit.ops.low_rank_svd import low_rank_svd
from lorakit.ops.truncated_svd import Triplets, leading_triplets


def resize(
    state: AdapterState,
    r: int | None = None,
    *,
    energy: float | None = None,
    max_bytes: int | None = None,
    dense: bool = False,
    dtype: torch.dtype | None = None,
) -> Fitted:
    """The adapter at another rank: at each target the best approximation that there is at that rank.

    Low-rank methods become plain LoRA, and so does what is inside a DoRA, whose magnitude stays (the residual is then
    of the direction's change). Other targets, such as a trained head, stay as they are.

    Args:
        state: The adapter.
        r: The rank of every target. Where it is more than there is, zeros fill up: the change stays, and the new
            directions do not train. With ``energy`` it is the most.
        energy: Keep the fewest directions that hold this share of the squared norm of each target, in (0, 1].
        max_bytes: Keep the directions that hold the most of the squared norm of the whole adapter for their bytes, so
            that all tensors together take no more; every target keeps at least one.
        dense: Also bring methods without factors (LoHa, LoKr, LoRA-C) to a LoRA, by way of their dense change.
        dtype: Of the result; by default each target's own.

    Raises:
        ConfigError: No target has a rank, a tensor is not finite, or the settings make no sense.
    """
    if (max_bytes is not None) == (r is not None or energy is not None):
        raise ConfigError("resize needs r or energy or both, or else max_bytes.")
    cut = Cut(r, energy)
    require_finite(state, "The adapter")
    spec = state.spec
    found = {p: _triplets(state, p, dense) for p in spec.methods if _has_rank(spec.methods[p], dense)}
    if not found:
        used = sorted({m.name for m in spec.methods.values()})
        hint = (
            ""
            if dense
            else " LoHa, LoKr and LoRA-C can be brought to one by their dense change: dense=True (`--dense`)."
        )
        raise ConfigError(f"No target of this adapter has a rank (it uses {', '.join(used)}).{hint}")
    dtypes = {p: dtype or widest_dtype(list(state.parameters(p).values())) for p in found}
    if max_bytes is None:
        ranks = {p: cut.rank(triplets.S) for p, triplets in found.items()}
    else:
        ranks = _ranks_within(state, found, dtypes, max_bytes)
    fill = r if energy is None else None
    methods: dict[str, Method] = dict(spec.methods)
    tensors: dict[str, Mapping[str, Tensor]] = dict(state.tensors)
    residuals: dict[str, Residual] = {}
    for path, triplets in found.items():
        A, B, residuals[path] = split(triplets, ranks[path])
        if fill is not None and A.shape[-2] < fill:
            A = torch.nn.functional.pad(A, (0, 0, 0, fill - A.shape[-2]))
            B = torch.nn.functional.pad(B, (0, fill - B.shape[-1]))
        methods[path], tensors[path] = _replaced(state, path, A, B, dtypes[path])
    shared = {name: state.shared[name] for name in shared_shapes(methods)}
    return Fitted(
        AdapterState(AdapterSpec(methods, spec.shapes, spec.base, spec.info), tensors, shared), residuals
    )


def _inner(method: Method) -> Method:
    return method.inner if isinstance(method, DoRA) else method


def _has_rank(method: Method, dense: bool) -> bool:
    inner = _inner(method)
    return isinstance(inner, LowRankMethod) or (dense and isinstance(inner, DeltaMethod))


def _triplets(state: AdapterState, path: str, dense: bool) -> Triplets:
    inner = without_magnitude(state, path)
    if not isinstance(inner.spec.methods[path], LowRankMethod):
        change = dense_change(inner, path)
        return leading_triplets(change, min(change.shape[-2:]))
    A, B = low_rank_change(inner, path).folded()
    if not A.shape[-2]:  # a target that AdaLoRA has pruned away
        A, B = A.new_zeros(*A.shape[:-2], 1, A.shape[-1]), B.new_zeros(*B.shape[:-1], 1)
    return low_rank_svd(A, B)


def _replaced(
    state: AdapterState, path: str, A: Tensor, B: Tensor, dtype: torch.dtype
) -> tuple[Method, Mapping[str, Tensor]]:
    method = state.spec.methods[path]
    bias = bias_change(state, path)
    lora, own = as_lora(A, B, bias, scale=1.0, dtype=dtype)
    if not isinstance(method, DoRA):
        return lora, own
    return dataclasses.replace(method, inner=lora), {**own, "magnitude": state.tensors[path]["magnitude"]}


def _ranks_within(
    state: AdapterState, found: Mapping[str, Triplets], dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> dict[str, int]:
    """The ranks that keep the most of the squared norm: directions in the order of what they hold a byte."""
    each = {}
    left = max_bytes
    for path, shape in state.spec.shapes.items():
        if path in found:
            each[path] = numel_of_direction(shape) * dtypes[path].itemsize
            left -= each[path]
            other = {"lora_bias", "magnitude"}
        else:
            other = set(state.tensors[path])
        left -= sum(t.numel() * t.element_size() for name, t in state.tensors[path].items() if name in other)
    shared = shared_shapes({p: m for p, m in state.spec.methods.items() if p not in found})
    left -= sum(state.shared[name].numel() * state.shared[name].element_size() for name in shared)
    if left < 0:
        raise ConfigError(
            f"{max_bytes:,} bytes are too few: one direction at each target and what is not low-rank take "
            f"{max_bytes - left:,}."
        )
    worth = [
        (float(square) / each[path], path)
        for path, triplets in found.items()
        for square in triplets.S.square().reshape(-1, triplets.S.shape[-1]).sum(0)[1:]
    ]
    ranks = dict.fromkeys(found, 1)
    closed: set[str] = set()
    for value, path in sorted(worth, key=lambda entry: -entry[0]):
        if path in closed or not value:
            continue
        if each[path] > left:
            closed.add(path)  # its later directions hold less
            continue
        ranks[path] += 1
        left -= each[path]
    return ranks
