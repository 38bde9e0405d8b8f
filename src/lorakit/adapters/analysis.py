"""What can be seen in an adapter without its model: each target, the targets of a kind together, and two adapters.

The numbers of the LoRA paper's section 7: how large the change is and where, how many directions it has, what it has in
common with another adapter's, and, beside the base weights, what it amplifies.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

from lorakit.adapters.amplification import Amplification, amplification
from lorakit.adapters.change import Base, direction_of, has_factors
from lorakit.adapters.fit import Cut
from lorakit.adapters.places import Place, places
from lorakit.adapters.ranks import Ranks, choose_ranks
from lorakit.adapters.spectrum import Spectrum, spectrum
from lorakit.core import AdapterState, Shape
from lorakit.ops.threads import one_thread


@dataclass(frozen=True)
class TargetAnalysis:
    """One target of an adapter.

    Attributes:
        path: Of the target.
        place: Its layer and kind.
        method: The name of its method.
        shape: The facts of the target.
        r: The rank, of a method that has one.
        alpha: Its alpha.
        scale: The factor on B A.
        parameters: Numbers in its own tensors.
        bytes: Of these.
        dtype: Of these.
        spectrum: The singular values of its change; None of a method without factors, or with a NaN.
        amplification: Beside the base weight, where that was given.
    """

    path: str
    place: Place
    method: str
    shape: Shape
    r: int | None
    alpha: float | None
    scale: float | None
    parameters: int
    bytes: int
    dtype: str
    spectrum: Spectrum | None
    amplification: Amplification | None = None


@dataclass(frozen=True)
class Group:
    """Targets of one kind: the same place in their layers, size and method.

    Attributes:
        target: The kind, by the ending of the paths.
        method: Its name.
        size: Of each weight.
        sites: How many.
        r: The rank, of a low-rank method.
        alpha: Its alpha.
        scale: The factor on B A.
        parameters: Numbers in all of them.
        bytes: Of these.
        dtype: Of these.
        norm: Frobenius norm of the change, root of the sum of squares over the sites.
        top: The largest singular value of any site.
        effective_rank: The mean over the sites.
        stable_rank: The mean over the sites.
        energy_ranks: The least and the most directions that hold the share of the energy at a site.
        relative: Norm of the change by that of the base weight, of all sites together.
        amplification: The median of the factors of the sites.
    """

    target: str
    method: str
    size: str
    sites: int
    r: int | None
    alpha: float | None
    scale: float | None
    parameters: int
    bytes: int
    dtype: str
    norm: float | None
    top: float | None
    effective_rank: float | None
    stable_rank: float | None
    energy_ranks: tuple[int, int] | None
    relative: float | None
    amplification: float | None


@dataclass(frozen=True)
class Analysis:
    """An adapter, looked at.

    Attributes:
        state: The adapter.
        targets: Target path to what is known of it, in the order of the adapter.
        energy: The share of the energy that ranks are counted by.
        not_finite: Names ``path:tensor`` of the tensors that hold a NaN or an infinity.
    """

    state: AdapterState
    targets: Mapping[str, TargetAnalysis]
    energy: float
    not_finite: Sequence[str] = ()

    @property
    def with_spectrum(self) -> dict[str, Spectrum]:
        """The targets whose singular values are known."""
        return {path: t.spectrum for path, t in self.targets.items() if t.spectrum is not None}

    @cached_property
    def norm(self) -> float:
        """Frobenius norm of the change of all targets with a spectrum."""
        return math.hypot(*(s.frobenius for s in self.with_spectrum.values()), 0.0)

    @property
    def effective_rank(self) -> float | None:
        """The mean over the targets with a spectrum; None where there are none."""
        return _mean(s.effective_rank for s in self.with_spectrum.values())

    @cached_property
    def ranks(self) -> Ranks | None:
        """The ranks that hold the share of the energy; None where no target has a spectrum."""
        found = self.with_spectrum
        return choose_ranks(self.state, self.energy, spectra=found) if found else None

    @cached_property
    def groups(self) -> list[Group]:
        """The targets by kind, in the order of the adapter."""
        members: dict[tuple[object, ...], list[TargetAnalysis]] = {}
        for t in self.targets.values():
            key = (t.place.kind, t.method, str(t.shape), t.r, t.alpha, t.scale, t.dtype)
            members.setdefault(key, []).append(t)
        return [_group(found, self.energy) for found in members.values()]

    @property
    def layers(self) -> list[str]:
        """The layers that targets are in, by their numbers, and the empty one last."""
        found = {t.place.layer: t.place.number for t in self.targets.values()}
        container = {layer: n for n, layer in enumerate(dict.fromkeys(_container(one) for one in found))}
        return sorted(found, key=lambda one: (not one, container[_container(one)], found[one] or 0))

    def by_layer(self, value: Callable[[TargetAnalysis], float | None]) -> dict[str, dict[str, list[float]]]:
        """Kind to layer to the values of the targets there, the kinds in the order of the adapter.

        Args:
            value: Of a target; None leaves it out.
        """
        found: dict[str, dict[str, list[float]]] = {}
        for t in self.targets.values():
            if (v := value(t)) is not None:
                found.setdefault(t.place.kind, {}).setdefault(t.place.layer, []).append(v)
        return found

    def norms(self) -> dict[str, dict[str, float]]:
        """Kind to layer to the Frobenius norm of the change there."""
        found = self.by_layer(lambda t: t.spectrum.frobenius if t.spectrum else None)
        return {
            kind: {layer: math.hypot(*values) for layer, values in row.items()} for kind, row in found.items()
        }


def analyse(
    state: AdapterState, *, energy: float = 0.9, dense: bool = False, base: Base | None = None
) -> Analysis:
    """Look at every target of an adapter.

    Args:
        state: The adapter.
        energy: The share of the squared norm that ranks are counted by, in (0, 1].
        dense: Also form and decompose the changes of methods without factors (LoHa, LoKr, LoRA-C): slow on wide layers.
        base: Target path to base weight, read one at a time: adds what is amplified, at the targets with a spectrum
            that it has.

    Raises:
        ConfigError: The share makes no sense, or a base weight does not fit.
    """
    Cut(energy=energy)
    where = places(state.spec.methods)
    with one_thread():
        not_finite = state.non_finite()
    with nullcontext() if dense else one_thread():
        spectra = {path: spectrum(state, path, dense=dense) for path in state.spec.methods}
    known = _beside_base(state, spectra, base, energy) if base is not None else {}
    targets = {path: _target(state, path, where[path], spectra[path], known.get(path)) for path in where}
    return Analysis(state, targets, energy, not_finite)


def _beside_base(
    state: AdapterState, spectra: Mapping[str, Spectrum | None], base: Base, energy: float
) -> dict[str, Amplification]:
    """One base weight is in memory at a time."""
    found = {}
    for path, seen in spectra.items():
        if seen is not None and path in base:
            r = None if has_factors(state, path) else seen.energy_rank(energy)
            found[path] = amplification(state, path, base[path], r=r)
    return found


def _target(
    state: AdapterState, path: str, place: Place, seen: Spectrum | None, beside_base: Amplification | None
) -> TargetAnalysis:
    method = state.spec.methods[path]
    inner = direction_of(method)
    tensors = list(state.tensors[path].values())
    return TargetAnalysis(
        path,
        place,
        method.name,
        state.spec.shapes[path],
        r=getattr(inner, "r", None),
        alpha=getattr(inner, "alpha", None),
        scale=getattr(inner, "scale", None),
        parameters=sum(t.numel() for t in tensors),
        bytes=sum(t.numel() * t.element_size() for t in tensors),
        dtype="+".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors})),
        spectrum=seen,
        amplification=beside_base,
    )


def _group(members: list[TargetAnalysis], energy: float) -> Group:
    first = members[0]
    spectra = [t.spectrum for t in members if t.spectrum is not None]
    if len(spectra) < len(members):  # a sum over some of the sites would mislead
        spectra = []
    known = [t.amplification for t in members if t.amplification is not None]
    if len(known) < len(members):
        known = []
    ranks = [s.energy_rank(energy) for s in spectra]
    return Group(
        first.place.kind,
        first.method,
        str(first.shape),
        len(members),
        first.r,
        first.alpha,
        first.scale,
        sum(t.parameters for t in members),
        sum(t.bytes for t in members),
        first.dtype,
        norm=math.hypot(*(s.frobenius for s in spectra)) if spectra else None,
        top=max((s.top for s in spectra), default=None),
        effective_rank=_mean(s.effective_rank for s in spectra),
        stable_rank=_mean(s.stable_rank for s in spectra),
        energy_ranks=(min(ranks), max(ranks)) if ranks else None,
        relative=_share([a.whole for a in known], [a.weight for a in known]),
        amplification=statistics.median(a.factor for a in known) if known else None,
    )


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def _container(layer: str) -> str:
    return layer.rpartition(".")[0]


def _share(parts: list[float], wholes: list[float]) -> float | None:
    whole = math.hypot(*wholes, 0.0)
    return math.hypot(*parts) / whole if whole else None
