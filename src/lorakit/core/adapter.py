"""An adapter as data, with no model in memory: what it is (`AdapterSpec`), its numbers (`AdapterState`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit.core.method import Method
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError, ConfigError, listing
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

    Attributes:
        spec: What it is.
        tensors: Target path to that target's own tensors, by name.
        shared: The tensors that all targets share, by name; for almost all methods there are none.
    """

    spec: AdapterSpec
    tensors: Mapping[str, Mapping[str, Tensor]]
    shared: Mapping[str, Tensor] = field(default_factory=dict)

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
        want = shared_shapes(self.spec.methods)
        have = {name: tuple(t.shape) for name, t in self.shared.items()}
        if want != have:
            raise AdapterFileError(f"The targets of this adapter share tensors {want}; found {have}.")

    def parameters(self, path: str) -> dict[str, Tensor]:
        """All tensors that act at one target: its own and the shared ones."""
        own = self.tensors[path]
        return {**own, **self.shared} if self.spec.methods[path].shared_shapes() else dict(own)

    def all_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Every tensor once, as (path, name, tensor); the path of a shared one is empty."""
        for path, group in self.tensors.items():
            for name, tensor in group.items():
                yield path, name, tensor
        for name, tensor in self.shared.items():
            yield "", name, tensor

    @property
    def numel(self) -> int:
        """Numbers in all tensors."""
        return sum(t.numel() for _, _, t in self.all_tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for _, _, t in self.all_tensors())

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> AdapterState:
        """A copy with tensors of another dtype or on another device."""
        moved = {
            path: {name: t.to(device=device, dtype=dtype) for name, t in group.items()}
            for path, group in self.tensors.items()
        }
        shared = {name: t.to(device=device, dtype=dtype) for name, t in self.shared.items()}
        return AdapterState(self.spec, moved, shared)

    def plain(self) -> AdapterState:
        """The same change in its plainest words: a LoRA that is measured from its start becomes one of twice the rank.

        A prefix that a network makes becomes the prefix. Exact. What is lost is what training would go on with; an
        adapter that is plain already is returned as it is.
        """
        spec = self.spec
        made = {p: m.plain(spec.shapes[p], self.parameters(p)) for p, m in spec.methods.items()}
        methods = {path: method for path, (method, _) in made.items()}
        if methods == dict(spec.methods):
            return self
        tensors = {
            path: {name: t for name, t in group.items() if name not in method.shared_shapes()}
            for path, (method, group) in made.items()
        }
        shared = {name: self.shared[name] for name in shared_shapes(methods)}
        return AdapterState(AdapterSpec(methods, spec.shapes, spec.base, spec.info), tensors, shared)

    def compact(self) -> AdapterState:
        """The same change without what has no effect: the triplets that AdaLoRA has pruned.

        What was left out cannot come back: an adapter whose ranks are still to be moved is kept whole.
        """
        spec = self.spec
        made = {p: m.compact(spec.shapes[p], self.tensors[p]) for p, m in spec.methods.items()}
        methods = {path: method for path, (method, _) in made.items()}
        tensors = {path: group for path, (_, group) in made.items()}
        return AdapterState(AdapterSpec(methods, spec.shapes, spec.base, spec.info), tensors, self.shared)

    def non_finite(self) -> list[str]:
        """Names ``path:tensor`` of the tensors that hold a NaN or an infinity."""
        return [f"{path}:{name}".lstrip(":") for path, name, t in self.all_tensors() if not all_finite(t)]


def shared_shapes(methods: Mapping[str, Method]) -> dict[str, tuple[int, ...]]:
    """Name to size of what the targets of an adapter share.

    Raises:
        ConfigError: Two targets would share tensors of the same name and different sizes.
    """
    shared: dict[str, tuple[int, ...]] = {}
    for path, method in methods.items():
        for name, size in method.shared_shapes().items():
            if shared.setdefault(name, size) != size:
                raise ConfigError(
                    f"All targets of one adapter share {name!r}, but {path!r} needs it in size {size} and another "
                    f"target in size {shared[name]}. Put them in two adapters."
                )
    return shared
