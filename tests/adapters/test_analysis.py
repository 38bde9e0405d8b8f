"""What is told of an adapter: by target, by kind, by layer, and beside another."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import lorakit as lk
from lorakit.adapters import amplification, analyse, spectrum
from lorakit.core import Shape
from lorakit.errors import ConfigError
from tests.adapters.states import change, linear, random_state

METHOD = lk.LoRA(r=3, alpha=6)


def model(layers: int = 3, seed: int = 0, r: int = 3) -> lk.AdapterState:
    """An adapter of q and up in each layer, and a head."""
    lora = lk.LoRA(r=r, alpha=6)
    shapes = {f"layers.{n}.{leaf}": linear(12, 10) for n in range(layers) for leaf in ("attn.q", "mlp.up")}
    shapes["head"] = Shape("parameter", out=3, in_=4, stored=(3, 4))
    methods = {path: lora if path != "head" else lk.FullFineTuning() for path in shapes}
    return random_state(methods, shapes, seed=seed)


def test_targets() -> None:
    state = model()
    found = analyse(state)
    assert list(found.targets) == list(state.spec.methods)
    one = found.targets["layers.1.attn.q"]
    assert (one.place.layer, one.place.kind, one.method, one.r, one.alpha, one.scale) == (
        "layers.1", "q", "lora", 3, 6, 2,
    )  # fmt: skip
    assert (one.parameters, one.bytes, one.dtype) == (3 * 22, 8 * 3 * 22, "float64")
    assert one.spectrum is not None
    assert one.spectrum.frobenius == pytest.approx(float(change(state, "layers.1.attn.q").norm()))
    head = found.targets["head"]
    assert (head.spectrum, head.r, head.method) == (None, None, "full")
    assert found.norm == pytest.approx(
        math.hypot(*(float(change(state, p).norm()) for p in found.with_spectrum))
    )


def test_groups() -> None:
    state = model()
    found = analyse(state, energy=0.8)
    q, up, head = found.groups
    assert (q.target, up.target, head.target) == ("q", "up", "head")
    spectra = [spectrum(state, f"layers.{n}.attn.q") for n in range(3)]
    assert all(spectra)
    assert q.sites == 3
    assert q.parameters == 3 * 66
    assert q.norm == pytest.approx(math.hypot(*(s.frobenius for s in spectra if s)))
    assert q.top == pytest.approx(max(s.top for s in spectra if s))
    assert q.effective_rank == pytest.approx(statistics.mean(s.effective_rank for s in spectra if s))
    assert q.stable_rank == pytest.approx(statistics.mean(s.stable_rank for s in spectra if s))
    ranks = [s.energy_rank(0.8) for s in spectra if s]
    assert q.energy_ranks == (min(ranks), max(ranks))
    assert (head.norm, head.top, head.energy_ranks, head.amplification) == (None, None, None, None)
    assert found.ranks is not None
    assert found.ranks.energy == 0.8
    assert {found.ranks.targets[f"layers.{n}.attn.q"] for n in range(3)} == set(ranks)


def test_layers_are_in_the_order_of_their_numbers() -> None:
    state = model(12)
    shuffled = dict(sorted(state.spec.methods.items()))  # 0, 1, 10, 11, 2: as files are sorted
    spec = lk.AdapterSpec(shuffled, state.spec.shapes)
    found = analyse(lk.AdapterState(spec, state.tensors))
    assert found.layers == [*(f"layers.{n}" for n in range(12)), ""]
    norms = found.norms()
    assert set(norms) == {"q", "up"}
    assert norms["up"]["layers.10"] == pytest.approx(float(change(state, "layers.10.mlp.up").norm()))


def test_several_targets_of_a_kind_in_a_layer_add_up() -> None:
    shapes = {f"layers.{n}.experts.{e}.w": linear() for n in range(2) for e in range(3)}
    state = random_state(dict.fromkeys(shapes, METHOD), shapes)
    norms = analyse(state).norms()
    each = [float(change(state, f"layers.1.experts.{e}.w").norm()) for e in range(3)]
    assert norms == {
        "w": {"layers.0": pytest.approx(norms["w"]["layers.0"]), "layers.1": pytest.approx(math.hypot(*each))}
    }


def test_beside_the_base() -> None:
    state = model()
    W = {path: torch.randn(12, 10, dtype=torch.float64) for path in state.spec.methods if path != "head"}
    del W["layers.2.mlp.up"]
    found = analyse(state, base=W)
    for path, weight in W.items():
        assert found.targets[path].amplification == amplification(state, path, weight)
    q, up, _ = found.groups
    factors = [amplification(state, p, W[p]).factor for p in W if p.endswith(".q")]
    assert q.amplification == pytest.approx(statistics.median(factors))
    assert up.amplification is None  # one of them is not known
    norms = [math.hypot(*(float(x.norm()) for x in group)) for group in (
        [change(state, p) for p in W if p.endswith(".q")], [W[p] for p in W if p.endswith(".q")],
    )]  # fmt: skip
    assert q.relative == pytest.approx(norms[0] / norms[1])


def test_methods_without_factors() -> None:
    state = random_state({"a": lk.LoHa(r=2, alpha=1), "b": lk.IA3()}, {"a": linear(), "b": linear()})
    assert analyse(state).with_spectrum == {}
    assert analyse(state).ranks is None
    assert analyse(state).effective_rank is None
    found = analyse(state, dense=True).with_spectrum
    assert set(found) == {"a"}
    values = torch.linalg.svdvals(change(state, "a"))
    assert torch.allclose(found["a"].values, values)


def test_a_share_that_makes_no_sense() -> None:
    with pytest.raises(ConfigError, match="share of the squared norm"):
        analyse(model(), energy=2)
