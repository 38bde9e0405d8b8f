"""Small models to attach to, and a complete picture of a model's state to compare before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


class Mlp(nn.Module):
    """Two linear layers and a norm; inputs (..., 6), outputs (..., 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.norm(self.fc1(x))))


class TiedLm(nn.Module):
    """An embedding whose table is also the weight of the output head, as in most small language models."""

    def __init__(self, *, tied: bool = True, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=padding_idx)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


def fill(model: nn.Module, name: str | None = None, *, seed: int = 0, std: float = 0.3) -> nn.Module:
    """Give an adapter's parameters (all adapters': no name) values that change the output; every call the same."""
    generator = torch.Generator().manual_seed(seed)
    found = False
    for path, parameter in model.named_parameters():
        parts = path.split(".")
        if "lorakit" in parts and (name is None or parts[parts.index("lorakit") + 2] == name):
            found = True
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    assert found, f"no parameters of {name!r}"
    return model


def with_adapters(model: nn.Module, *names: str, method: Any = None, targets: Any = None) -> nn.Module:
    """The model, carrying adapters of these names with different random values; the first is active."""
    for i, name in enumerate(names):
        lk.attach(model, method or lk.LoRA(r=2), targets, name=name)
        fill(model, name, seed=i + 1)
    return model


def picture(model: nn.Module) -> dict[str, Any]:
    """All there is to a model: objects, classes, hooks, modes, flags, attributes, and every bit of every tensor.

    What a failed call leaves behind, or a detach forgets, shows as a difference of two pictures.
    """
    shown: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        shown[f"{path}:module"] = (id(module), type(module), module.training, tuple(module._modules))
        shown[f"{path}:attributes"] = sorted(module.__dict__)
        shown[f"{path}:hooks"] = {table: dict(module.__dict__.get(table) or {}) for table in HOOKS}
        for kind in ("_parameters", "_buffers"):
            for name, tensor in module.__dict__[kind].items():
                shown[f"{path}:{kind}.{name}"] = None if tensor is None else (id(tensor), *bits(tensor))
    try:
        report = lk.report(model)
        shown["report"] = (tuple(a.name for a in report.adapters), report.active, report.merged)
    except lk.LorakitError:
        shown["report"] = None
    return shown


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor's bytes, with its dtype, size and flag."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), tensor.requires_grad, raw


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def same_values(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether the state dict has the same keys in the same order, and every bit the same."""
    now = model.state_dict()
    return list(now) == list(before) and all(bits(now[k])[3] == bits(before[k])[3] for k in before)


def names_of(model: nn.Module) -> list[str]:
    """The adapters that a model carries."""
    try:
        return [adapter.name for adapter in lk.report(model).adapters]
    except lk.LorakitError:
        return []
