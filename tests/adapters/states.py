"""Adapters made of random numbers, and their changes written out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.adapters.change import ShapeTarget
from lorakit.core import AdapterSpec, DeltaMethod, Method, Shape


def normal(*size: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_state(
    methods: Mapping[str, Method],
    shapes: Mapping[str, Shape],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    base: str | None = None,
) -> lk.AdapterState:
    """An adapter of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        path: {
            name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
            for name, size in method.shapes(shapes[path]).items()
        }
        for path, method in methods.items()
    }
    shared: dict[str, Tensor] = {}
    for method in methods.values():
        for name, size in method.shared_shapes().items():
            shared.setdefault(name, torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))
    return lk.AdapterState(AdapterSpec(methods, dict(shapes), base), tensors, shared)


def linear(out: int = 9, in_: int = 7) -> Shape:
    """A linear layer."""
    return Shape("linear", out=out, in_=in_)


def loras(
    path: str = "q", out: int = 9, in_: int = 7, dtype: torch.dtype = torch.float64
) -> list[lk.AdapterState]:
    """Three adapters of one layer: of different ranks and scalings."""
    shape = {path: linear(out, in_)}
    made = [lk.LoRA(r=3, alpha=6), lk.LoRA(r=2, alpha=5, scaling="rslora"), lk.LoRA(r=4, alpha=1)]
    return [random_state({path: m}, shape, seed=n, dtype=dtype) for n, m in enumerate(made)]


def change(state: lk.AdapterState, path: str = "q") -> Tensor:
    """``delta`` of one target by the method's own formula; zero where there is no such target."""
    if path not in state.spec.methods:
        return torch.zeros(())
    method = state.spec.methods[path]
    assert isinstance(method, DeltaMethod)
    p = {name: t.double() for name, t in state.parameters(path).items()}
    return method.delta(ShapeTarget(path, state.spec.shapes[path]), p)


def extracted(
    model: nn.Module, method: Method, *, seed: int = 0, targets: object = "all-linear"
) -> lk.AdapterState:
    """An adapter of a model, with normal numbers in all that trains."""
    lk.attach(model, method, targets=targets, seed=seed, name="made")  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    state = lk.extract(model, "made")
    lk.detach(model)
    return state
