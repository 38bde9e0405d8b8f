"""Counting an adapter before it exists: from the facts of its targets, without a tensor of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lorakit.attach.planning import Key, check_starts, plan_method
from lorakit.attach.planning import Plan as Sites
from lorakit.core.adapter import AdapterSpec, shared_shapes
from lorakit.core.method import Method
from lorakit.core.selection import Selector
from lorakit.targets.counting import base_numel


@dataclass(frozen=True)
class SiteCount:
    """An adapter's own parameters at one target.

    Attributes:
        path: Where.
        size: Size of the weight there, as text.
        method: The method's name.
        stored: Numbers that are kept.
        trainable: Those of them that are trained.
    """

    path: str
    size: str
    method: str
    stored: int
    trainable: int

    @property
    def ending(self) -> str:
        """The last part of the path, by which sites are grouped."""
        return self.path.rsplit(".", 1)[-1] or "(model)"


@dataclass(frozen=True)
class Counts:
    """What an adapter holds, exactly.

    Attributes:
        base: Numbers in the base model, tied weights once.
        sites: Its targets.
        shared: Numbers that all targets share.
        shared_trainable: Those of them that are trained.
        spec: The adapter without its numbers.
    """

    base: int
    sites: tuple[SiteCount, ...]
    shared: int
    shared_trainable: int
    spec: AdapterSpec

    @property
    def stored(self) -> int:
        """Numbers in the adapter."""
        return self.shared + sum(site.stored for site in self.sites)

    @property
    def trainable(self) -> int:
        """Numbers that are trained."""
        return self.shared_trainable + sum(site.trainable for site in self.sites)

    @property
    def total(self) -> int:
        """Numbers in the base and the adapter together, as PEFT's ``all params``."""
        return self.base + self.stored

    @property
    def share(self) -> float:
        """``trainable / total``."""
        return self.trainable / self.total

    def groups(self) -> dict[tuple[str, str, str], list[SiteCount]]:
        """The sites by ending, size and method."""
        found: dict[tuple[str, str, str], list[SiteCount]] = {}
        for site in self.sites:
            found.setdefault((site.ending, site.size, site.method), []).append(site)
        return found


def count(
    model: nn.Module,
    adapter: Method | Mapping[str, Method] | Mapping[Key, Method],
    targets: Selector | None = None,
    exclude: Selector | None = None,
) -> Counts:
    """Count the adapter that `lorakit.attach` would make of the same arguments; the model may be on the meta device.

    Raises:
        TargetError: Something named was not found or cannot be adapted.
        ConfigError: A setting makes no sense for a target.
    """
    sites = plan_method(model, adapter, targets, exclude)
    check_starts(sites)
    return counted(model, sites)


def counted(model: nn.Module, sites: Sites) -> Counts:
    """The same for targets that have been chosen."""
    methods = {path: method for path, (_, method) in sites.items()}
    listed = []
    for path, (target, method) in sites.items():
        sizes = {name: math.prod(size) for name, size in method.shapes(target.shape).items()}
        trained = sum(n for name, n in sizes.items() if name not in method.frozen)
        listed.append(SiteCount(path, str(target.shape), method.name, sum(sizes.values()), trained))
    common = {name: math.prod(size) for name, size in shared_shapes(methods).items()}
    frozen = {name for method in methods.values() for name in method.frozen}
    spec = AdapterSpec(methods, {path: target.shape for path, (target, _) in sites.items()})
    return Counts(
        base_numel(model),
        tuple(listed),
        sum(common.values()),
        sum(n for name, n in common.items() if name not in frozen),
        spec,
    )
