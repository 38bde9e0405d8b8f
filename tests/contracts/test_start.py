"""A start is decided by the seed alone, and what is named frozen exists."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.pairs import SUPPORTED, Case
from tests.contracts.settings import SETTINGS

FIRST = dict(reversed(SUPPORTED))


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_seed_gives_the_same_start(setting: str) -> None:
    starts = []
    for elsewhere in (1, 2):  # what else draws random numbers makes no difference
        case = Case(FIRST[setting])
        with torch.random.fork_rng():
            torch.manual_seed(elsewhere)
            case.attach(setting, random=False)
        starts.append({name: p.detach().clone() for name, p in case.parameters().items()})
    assert starts[0].keys() == starts[1].keys()
    for name, p in starts[0].items():
        assert torch.equal(p, starts[1][name]), (
            f"{setting}: {name} differs between two adapters of one seed: start() must draw from its generator alone"
        )


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_frozen_is_a_parameter(setting: str) -> None:
    case = Case(FIRST[setting])
    case.attach(setting, random=False)
    method, names = SETTINGS[setting].method, set(case.parameters())
    assert method.frozen <= names, (
        f"{setting}: frozen names {sorted(method.frozen - names)}, of {sorted(names)}"
    )
    assert not {name for name, p in case.parameters().items() if p.requires_grad} & method.frozen
