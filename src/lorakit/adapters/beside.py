"""Two adapters beside each other: how much alike their changes are, and the directions that these have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.adapters.change import has_factors, is_low_rank
from lorakit.adapters.compare import cosine
from lorakit.adapters.subspaces import Similarity, change_triplets, real_rows, similarity_of
from lorakit.adapters.together import Together
from lorakit.core import AdapterSpec, AdapterState
from lorakit.core.adapter import shared_shapes
from lorakit.ops.low_rank_svd import low_rank_inner
from lorakit.ops.threads import one_thread
from lorakit.ops.truncated_svd import Triplets


@dataclass(frozen=True)
class Beside:
    """Two adapters beside each other, at the targets that both adapt with factors.

    Attributes:
        inner: Target path to the sum of the products of the entries of the two changes; not of a DoRA, whose change is
            not known without the base.
        norms: The same paths to the Frobenius norms of the two.
        inputs: Target path to the similarity of the directions that the changes read, where both change something.
        outputs: Target path to that of the directions that they write.
    """

    inner: Mapping[str, float]
    norms: Mapping[str, tuple[float, float]]
    inputs: Mapping[str, Similarity]
    outputs: Mapping[str, Similarity]

    @property
    def cosine(self) -> float | None:
        """Of all the changes as one vector; None where there are none."""
        norms = [math.hypot(*(pair[side] for pair in self.norms.values()), 0.0) for side in (0, 1)]
        return cosine(math.fsum(self.inner.values()), *norms)

    def cosine_at(self, path: str) -> float | None:
        """That of one target; None where one of them changes nothing."""
        return cosine(self.inner[path], *self.norms[path])


def beside(a: AdapterState, b: AdapterState, *, any_base: bool = False) -> Beside:
    """What two adapters have in common.

    Args:
        a: The first.
        b: The second.
        any_base: Compare adapters whose files name different base models.

    Raises:
        ConfigError: They do not belong to one base, or a tensor is not finite.
    """
    both = [
        path
        for path in a.spec.methods
        if path in b.spec.methods and has_factors(a, path) and has_factors(b, path)
    ]
    inner: dict[str, float] = {}
    norms: dict[str, tuple[float, float]] = {}
    inputs: dict[str, Similarity] = {}
    outputs: dict[str, Similarity] = {}
    with one_thread(), torch.no_grad():
        Together([_part(a, both), _part(b, both)], any_base=any_base)
        for path in both:
            first, second = change_triplets(a, path), change_triplets(b, path)
            if is_low_rank(a, path) and is_low_rank(b, path):
                inner[path] = _inner(first, second)
                norms[path] = float(first.S.norm()), float(second.S.norm())
            reads, writes = zip(_directions(first), _directions(second), strict=True)
            if reads[0].shape[-2] and reads[1].shape[-2]:
                inputs[path], outputs[path] = similarity_of(*reads), similarity_of(*writes)
    return Beside(inner, norms, inputs, outputs)


def mean_similarity(found: Iterable[Similarity]) -> tuple[Tensor, Tensor] | None:
    """The mean of phi over targets, and that of random subspaces of the same sizes, each ``(k1, k2)``.

    Of as many directions as there are at every target; None without targets.
    """
    listed = list(found)
    if not listed:
        return None
    k1, k2 = (min(one.phi.shape[dim] for one in listed) for dim in (0, 1))
    phi = torch.stack([one.phi[:k1, :k2] for one in listed]).mean(0)
    return phi, torch.stack([one.random[:k1, :k2] for one in listed]).mean(0)


def _directions(triplets: Triplets) -> tuple[Tensor, Tensor]:
    U, S, Vh = triplets
    size = max(U.shape[-2], Vh.shape[-1])
    return real_rows(S, Vh, size), real_rows(S, U.mT, size)


def _inner(first: Triplets, second: Triplets) -> float:
    """``tr(deltaᵀ delta')`` from the small products of the singular vectors."""
    B1, B2 = (one.U * one.S.unsqueeze(-2) for one in (first, second))
    return float(low_rank_inner(first.Vh, B1, second.Vh, B2))


def _part(state: AdapterState, paths: list[str]) -> AdapterState:
    """An adapter with some of its targets."""
    methods = {path: state.spec.methods[path] for path in paths}
    shapes = {path: state.spec.shapes[path] for path in paths}
    shared = {name: state.shared[name] for name in shared_shapes(methods)}
    spec = AdapterSpec(methods, shapes, state.spec.base, state.spec.info)
    return AdapterState(spec, {path: state.tensors[path] for path in paths}, shared)
