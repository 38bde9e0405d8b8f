"""An adapter as data, with no model in memory: what it is (`AdapterSpec`), its numbers (`AdapterState`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError, listing
from lorakit.ops import all_finite


@dataclass(frozen=True)
class AdapterSpec:
    """Which method adapts which target.

    Attributes:
        methods: Target path to the method there (per-pattern settings already resolved).
        shapes: Target path to the facts of the target.
        base: The name of the base model, as its maker knew it; information, not checked.
        info: Free JSON: task, chat template, tool version.
    """

    methods: Mapping[str, Method]
    shapes: Mapping[str, Shape]
    base: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.methods) != set(self.shapes):
            odd = sorted(set(self.methods) ^ set(self.shapes))
            raise AdapterFileError(
                f"An adapter needs a method and a shape for each target; one is missing for {listing(odd)}."
            )


@dataclass(frozen=True)
class AdapterState:
    """A spec with its tensors: ``tensors[path][name]`` has the size ``spec.methods[path].shapes(...)[name]``.

    `lorakit.extract` makes one from a model, `lorakit.attach` puts one on a model; they are inverses.
    """

    spec: AdapterSpec
    tensors: Mapping[str, Mapping[str, Tensor]]

    def __post_init__(self) -> None:
        if set(self.tensors) != set(self.spec.methods):
            odd = sorted(set(self.tensors) ^ set(self.spec.methods))
            raise AdapterFileError(
                f"The tensors and the spec of an adapter name different targets: {listing(odd)}."
            )
        for path, method in self.spec.methods.items():
            want = method.shapes(self.spec.shapes[path])
            have = {name: tuple(t.shape) for name, t in self.tensors[path].items()}
            if want != have:
                raise AdapterFileError(
                    f"At {path!r}, {method.name} on a {self.spec.shapes[path]} target has tensors {want}; "
                    f"found {have}."
                )

    @property
    def numel(self) -> int:
        """Numbers in all tensors."""
        return sum(t.numel() for group in self.tensors.values() for t in group.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for group in self.tensors.values() for t in group.values())

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> AdapterState:
        """A copy with tensors of another dtype or on another device."""
        moved = {
            path: {name: t.to(device=device, dtype=dtype) for name, t in group.items()}
            for path, group in self.tensors.items()
        }
        return AdapterState(self.spec, moved)

    def non_finite(self) -> list[str]:
        """Names ``path:tensor`` of the tensors that hold a NaN or an infinity."""
        return [
            f"{path}:{name}"
            for path, group in self.tensors.items()
            for name, t in group.items()
            if not all_finite(t)
        ]
