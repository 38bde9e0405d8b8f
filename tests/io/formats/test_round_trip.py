"""What is written in a format and read again is the same adapter, to the bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core import AdapterSpec, AdapterState, Method
from lorakit.core.target import Shape
from lorakit.io.formats import Hints
from lorakit.methods import FullFineTuning, LoKr, LoRA
from tests.io.formats.cases import DTYPES, loha, loras, same_bits, sizes, states, through

few = settings(max_examples=40, deadline=None)


@few
@given(states(st.one_of(loras(), loha()), dora=True), st.sampled_from(["kohya", "lycoris"]))
def test_kohya(state: AdapterState, to: str) -> None:
    again = through(state, to)
    same_bits(state, again)
    assert again.spec.methods == state.spec.methods


@few
@given(states(loras(), dora=True))
def test_diffusers(state: AdapterState) -> None:
    again = through(state, "diffusers")
    same_bits(state, again)
    assert again.spec.methods == state.spec.methods


@few
@given(states(loras()))
def test_diffusers_old_keeps_what_has_scale_one(state: AdapterState) -> None:
    methods: dict[str, Method] = {
        path: LoRA(r=m.r, alpha=m.r)  # type: ignore[attr-defined]
        for path, m in state.spec.methods.items()
    }
    plain = AdapterState(AdapterSpec(methods, state.spec.shapes), state.tensors)
    again = through(plain, "diffusers-old")
    same_bits(plain, again)
    assert again.spec.methods == methods


@few
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.sampled_from([-1, 2, 4]), st.booleans(),
    st.sampled_from([(), (3, 3)]), st.booleans(),
)  # fmt: skip
def test_lokr(
    out: int, channels: int, r: int, factor: int, both: bool, kernel: tuple[int, ...], tucker: bool
) -> None:
    shape = Shape("conv" if kernel else "linear", out=out, in_=channels * (9 if kernel else 1), kernel=kernel)
    method = LoKr(r=r, alpha=2.0, factor=factor, decompose_both=both, scaling="lycoris", tucker=tucker)
    tensors = {name: torch.randn(size) for name, size in method.shapes(shape).items()}
    state = AdapterState(AdapterSpec({"unet.a": method}, {"unet.a": shape}), {"unet.a": tensors})
    again = through(state, "kohya")
    same_bits(state, again)
    back = again.spec.methods["unet.a"]
    assert isinstance(back, LoKr)
    flat: Any = SimpleNamespace(batch=())  # all that the change depends on beside the tensors
    assert torch.equal(back.delta(flat, again.tensors["unet.a"]), method.delta(flat, tensors))


@few
@given(st.lists(st.tuples(sizes, sizes, st.integers(1, 4), st.sampled_from(DTYPES)), min_size=1, max_size=4))
def test_loralib(layers: list[tuple[int, int, int, torch.dtype]]) -> None:
    methods: dict[str, Method] = {
        f"layers.{n}.q": LoRA(r=r, alpha=16.0) for n, (_, _, r, _) in enumerate(layers)
    }
    shapes = {f"layers.{n}.q": Shape("linear", out=o, in_=i) for n, (o, i, _, _) in enumerate(layers)}
    methods["head.bias"], shapes["head.bias"] = (
        FullFineTuning(),
        Shape("parameter", out=3, in_=1, stored=(3,)),
    )
    tensors = {
        path: {name: torch.randn(size) for name, size in method.shapes(shapes[path]).items()}
        for path, method in methods.items()
    }
    for n, (*_, dtype) in enumerate(layers):
        tensors[f"layers.{n}.q"] = {name: t.to(dtype) for name, t in tensors[f"layers.{n}.q"].items()}
    state = AdapterState(AdapterSpec(methods, shapes), tensors)
    for ending in (".bin", ".safetensors"):
        again = through(state, "loralib", ending, Hints(alpha=16.0))
        same_bits(state, again)
        assert again.spec.methods == methods
