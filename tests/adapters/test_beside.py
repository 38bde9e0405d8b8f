"""Two adapters beside each other."""

from __future__ import annotations

import pytest
import torch

import lorakit as lk
from lorakit.adapters import beside, compare, similarity
from lorakit.adapters.beside import mean_similarity
from lorakit.errors import ConfigError
from tests.adapters.states import change, linear, random_state
from tests.adapters.test_analysis import METHOD, model


def test_two_adapters() -> None:
    a, b = model(seed=1), model(seed=2, r=5)
    found = beside(a, b)
    paths = [path for path in a.spec.methods if path != "head"]
    assert list(found.inner) == list(found.norms) == list(found.inputs) == list(found.outputs) == paths
    for path in paths:
        for of, side in (("inputs", found.inputs), ("outputs", found.outputs)):
            assert torch.allclose(side[path].phi, similarity(a, b, path, of).phi)  # type: ignore[arg-type]
    flat = [torch.cat([change(s, p).flatten() for p in paths]) for s in (a, b)]
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)))
    likeness = compare(
        *(
            lk.AdapterState(
                lk.AdapterSpec({p: s.spec.methods[p] for p in paths}, {p: s.spec.shapes[p] for p in paths}),
                {p: s.tensors[p] for p in paths},
            )
            for s in (a, b)
        )
    )
    assert found.cosine == pytest.approx(likeness.whole.cosine)
    for path, one in likeness.targets.items():
        assert found.cosine_at(path) == pytest.approx(one.cosine)
        assert found.norms[path] == pytest.approx((one.norm_a, one.norm_b))
    assert beside(a, a).cosine == pytest.approx(1)
    phi, random = mean_similarity(found.inputs.values()) or (None, None)
    assert phi is not None
    assert random is not None
    assert torch.allclose(phi, torch.stack([s.phi for s in found.inputs.values()]).mean(0))
    assert float(random[2, 4]) == pytest.approx(0.5)
    assert mean_similarity([]) is None


def test_two_adapters_that_share_little() -> None:
    a, b = model(1), model(3)
    assert set(beside(a, b).inner) == {"layers.0.attn.q", "layers.0.mlp.up"}
    other = random_state({"k": METHOD}, {"k": linear()})
    found = beside(a, other)
    assert (found.inner, found.inputs, found.cosine) == ({}, {}, None)
    fresh = lk.AdapterState(
        a.spec, {p: {n: t * (n != "lora_B") for n, t in group.items()} for p, group in a.tensors.items()}
    )
    found = beside(a, fresh)
    assert (found.inputs, found.outputs, found.cosine) == ({}, {}, None)
    assert found.cosine_at("layers.0.attn.q") is None


def test_dora_has_directions_and_no_cosine() -> None:
    shapes = {"q": linear()}
    states = [random_state({"q": lk.DoRA(METHOD)}, shapes, seed=n) for n in range(2)]
    found = beside(*states)
    assert found.cosine is None
    assert set(found.inputs) == {"q"}


def test_bases_that_differ() -> None:
    a, b = (random_state({"q": METHOD}, {"q": linear()}, base=base) for base in ("x/one", "x/two"))
    with pytest.raises(ConfigError, match="different base models"):
        beside(a, b)
    assert set(beside(a, b, any_base=True).inner) == {"q"}
