"""Adapters of layers with made-up names, for round trips through files."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import strategies as st

from lorakit.core import AdapterSpec, AdapterState, Method
from lorakit.core.target import Shape
from lorakit.io.formats import Hints, read_any, write_as
from lorakit.methods import DoRA, LoHa, LoKr, LoRA

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
word = st.sampled_from(["blocks", "0", "1", "10", "attn", "to_q", "to_out", "fc_1", "proj", "conv", "ü"])
sizes = st.integers(1, 8)
alphas = st.sampled_from([1.0, 4.0, 0.1, 7.5, -2.0])


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kernel = draw(st.sampled_from([(), (), (3,), (1, 1), (3, 3), (2, 1)]))
    in_ = draw(sizes) * math.prod(kernel)
    return Shape("conv" if kernel else "linear", out=draw(sizes), in_=in_, kernel=kernel)


def loras() -> st.SearchStrategy[Method]:
    return st.builds(LoRA, r=st.integers(1, 4), alpha=alphas)


def loha() -> st.SearchStrategy[Method]:
    return st.builds(LoHa, r=st.integers(1, 4), alpha=alphas, tucker=st.booleans())


@st.composite
def states(draw: st.DrawFn, methods: st.SearchStrategy[Method], *, dora: bool = False) -> AdapterState:
    paths = draw(
        st.lists(
            st.tuples(st.sampled_from(PARTS), st.lists(word, min_size=1, max_size=3)).map(
                lambda made: ".".join([made[0], *made[1]])
            ),
            min_size=1,
            max_size=5,
            unique_by=lambda path: path.replace(".", "_").replace("transformer_", "unet_"),
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    of, facts, tensors = {}, {}, {}
    for path in paths:
        method, facts[path] = draw(methods), draw(shapes())
        if isinstance(method, LoHa) and math.prod(facts[path].kernel) == 1:  # cores are for kernels alone
            method = replace(method, tucker=False)
        of[path] = DoRA(inner=method) if dora and draw(st.booleans()) else method
        dtype = draw(st.sampled_from(DTYPES))
        tensors[path] = {
            name: torch.randn(size, generator=generator).to(dtype)
            for name, size in of[path].shapes(facts[path]).items()
        }
    return AdapterState(AdapterSpec(of, facts), tensors)


def through(
    state: AdapterState, to: str, ending: str = ".safetensors", hints: Hints | None = None
) -> AdapterState:
    """Written in a format and read again, recognised by its keys."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"adapter{ending}"
        write_as(state, path, to, hints=hints)
        again, found = read_any(path, hints=hints, allow_pickle=True)
    assert found == to, (found, to)
    return again


def same_bits(a: AdapterState, b: AdapterState) -> None:
    """The same targets and shapes, and every tensor the same in every bit, dtype included."""
    assert dict(a.spec.shapes) == dict(b.spec.shapes)
    for path, group in a.tensors.items():
        assert group.keys() == b.tensors[path].keys()
        for name, tensor in group.items():
            other = b.tensors[path][name]
            assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), (path, name)
            bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other)]
            assert torch.equal(*bits), (path, name)


__all__ = ["DTYPES", "Hints", "LoKr", "loha", "loras", "same_bits", "shapes", "states", "through"]
