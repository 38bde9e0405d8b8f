"""A magnitude for each feature of a weight beside a method that changes its direction: what DoRA's two forms share."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorakit.core.method import DeltaMethod, Method, Tensors, WeightMethod
from lorakit.core.process import Site, TrainingProcess
from lorakit.core.target import Shape, Target
from lorakit.errors import ConfigError
from lorakit.methods.lora import LoRA


@dataclass(frozen=True)
class Decomposed(WeightMethod):
    """A weight as magnitudes times directions; ``inner`` changes the directions.

    Attributes:
        inner: The method that changes the direction.
    """

    inner: DeltaMethod = field(default_factory=LoRA)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, DeltaMethod):
            raise ConfigError(
                f"{type(self).__name__} wraps a method that adds a change to the weight, such as LoRA; got "
                f"{self.inner!r}."
            )

    @property
    def roles(self) -> Mapping[str, str]:  # type: ignore[override]
        """Those of the inner method, and the magnitude."""
        return {**self.inner.roles, "magnitude": "magnitude"}

    @property
    def frozen(self) -> frozenset[str]:
        """Those of the inner method."""
        return self.inner.frozen

    def for_path(self, path: str) -> Decomposed:
        """The inner method's settings for one target."""
        return self._around(self.inner.for_path(path))

    def patterns(self) -> tuple[str, ...]:
        """Those of the inner method."""
        return self.inner.patterns()

    def for_targets(self, shapes: Mapping[str, Shape]) -> Decomposed:
        """The inner method's settings for all targets."""
        return self._around(self.inner.for_targets(shapes))

    def process(self, sites: Sequence[Site], total_steps: int) -> TrainingProcess | None:
        """That of the inner method."""
        inside = []
        for site in sites:
            assert isinstance(site.method, Decomposed)
            inside.append(site._replace(method=site.method.inner))
        return self.inner.process(inside, total_steps)

    def compact(self, shape: Shape, tensors: Tensors) -> tuple[Decomposed, Tensors]:
        """That of the inner method, beside the magnitude."""
        inner, kept = self.inner.compact(shape, _without_magnitude(tensors))
        return self._around(inner), {**kept, "magnitude": tensors["magnitude"]}

    def plain(self, shape: Shape, tensors: Tensors) -> tuple[Decomposed, Tensors]:
        """That of the inner method, beside the magnitude."""
        inner, kept = self.inner.plain(shape, _without_magnitude(tensors))
        return self._around(inner), {**kept, "magnitude": tensors["magnitude"]}

    def at_rows(
        self, shape: Shape, tensors: Tensors, start: int, stop: int
    ) -> tuple[Decomposed, Tensors] | None:
        """That of the inner method, beside the magnitude."""
        found = self.inner.at_rows(shape, _without_magnitude(tensors), start, stop)
        if found is None:
            return None
        inner, cut = found
        return self._around(inner), {
            **cut,
            "magnitude": self._magnitude_at(tensors["magnitude"], start, stop),
        }

    @abstractmethod
    def _magnitude_at(self, magnitude: Tensor, start: int, stop: int) -> Tensor:
        """The magnitude that belongs to some output rows."""

    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the inner method."""
        return self.inner.shared_shapes()

    def start_shared(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Those of the inner method."""
        return self.inner.start_shared(generator)

    @abstractmethod
    def norms(self, target: Target, p: Tensors, W: Tensor) -> Tensor:
        """The norms of ``W + delta``, of the size of the magnitude."""

    def check_start(self, target: Target) -> None:
        """That of the inner method."""
        self.inner.check_start(target)

    def start(self, target: Target, generator: torch.Generator | None, shared: Tensors) -> dict[str, Tensor]:
        """The inner start, with the magnitude at the norms, so that the output is unchanged."""
        inner = self.inner.start(target, generator, shared)
        W = target.weight()
        on_base = {name: t.to(W.device) for name, t in {**inner, **shared}.items()}
        return {
            **inner,
            "magnitude": self.norms(target, on_base, W).to(torch.promote_types(W.dtype, torch.float32)),
        }

    def supports(self, target: Target) -> str | None:
        """What the inner method supports, without a bias of its own."""
        if isinstance(self.inner, LoRA) and self.inner.bias:
            return "DoRA scales the weight and not the bias: use LoRA(bias=False) inside it"
        return self.inner.supports(target)

    def _around(self, inner: Method) -> Decomposed:
        """These settings around another inner method."""
        assert isinstance(inner, DeltaMethod)
        return dataclasses.replace(self, inner=inner)


def _without_magnitude(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "magnitude"}
