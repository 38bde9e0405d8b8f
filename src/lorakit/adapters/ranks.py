"""Choosing ranks from an adapter that was trained: at each target as many directions as hold a share of the change.

Train once with a rank that is large enough, look where the directions are used, and train again, or cut the adapter
(`lorakit.adapters.resize`), with ranks that follow. Rank by energy: the least ``k`` whose first ``k`` singular values
hold the share of the squared norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from lorakit.adapters.change import numel_of_direction
from lorakit.adapters.spectrum import Spectrum, spectrum
from lorakit.core import AdapterState
from lorakit.core.endings import smallest_pattern
from lorakit.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """Ranks for the targets of an adapter.

    Attributes:
        energy: The share of the squared norm that each target keeps, at least.
        targets: Target path to rank.
        before: Numbers in the factors at the ranks that the adapter has.
        after: The same at these ranks.
    """

    energy: float
    targets: Mapping[str, int]
    before: int
    after: int

    @property
    def r(self) -> int:
        """The most frequent rank: the setting ``r``."""
        return self._pattern[0]

    @property
    def rank_pattern(self) -> dict[str, int]:
        """The other ranks, by the endings of paths: the setting ``rank_pattern`` of `lorakit.LoRA` and of PEFT."""
        return dict(self._pattern[1])

    @cached_property
    def _pattern(self) -> tuple[int, dict[str, int]]:
        return smallest_pattern(self.targets)


def choose_ranks(
    state: AdapterState,
    energy: float = 0.9,
    *,
    least: int = 1,
    most: int | None = None,
    spectra: Mapping[str, Spectrum] | None = None,
) -> Ranks:
    """The least rank at each target that holds a share of the change.

    Args:
        state: A trained adapter with factors; other targets, such as a head, are left out of account.
        energy: The share of the squared norm of the change to keep at each target, in (0, 1].
        least: No rank is less.
        most: No rank is more.
        spectra: Target path to its spectrum, where they are known already.

    Raises:
        ConfigError: A setting makes no sense, no target has a rank, or the change of one is not finite.
    """
    if not isinstance(least, int) or least < 1 or (most is not None and most < least):
        raise ConfigError(f"Ranks from least to most, both at least 1, are needed; got {least=}, {most=}.")
    ranks, before, after = {}, 0, 0
    for path in state.spec.methods:
        found = spectra.get(path) if spectra is not None else spectrum(state, path)
        if found is None:
            continue
        ranks[path] = max(least, found.energy_rank(energy))
        if most is not None:
            ranks[path] = min(most, ranks[path])
        per_rank = numel_of_direction(state.spec.shapes[path])
        before += per_rank * found.values.shape[-1]
        after += per_rank * ranks[path]
    if not ranks:
        used = ", ".join(sorted({method.name for method in state.spec.methods.values()}))
        raise ConfigError(f"No target of this adapter has a rank and finite numbers (it uses {used}).")
    return Ranks(energy, ranks, before, after)
