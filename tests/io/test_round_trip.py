"""Whatever an adapter holds, reading what was written gives it back in every bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorakit.core import AdapterSpec, AdapterState, Method
from lorakit.core.target import Shape
from lorakit.io import read, why_not_peft, write
from lorakit.methods import BitFit, DoRA, FullFineTuning, LoRA, TokenRows
from tests.io.states import assert_equal

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
word = st.sampled_from(
    [
        "q_proj",
        "layers",
        "0",
        "1",
        "10",
        "out_proj",
        "in_proj_weight",
        "fc",
        "a-b",
        "weight",
        "bias",
        "base_layer",
        "lora_A",
        "default",
        "base_model",
        "model",
        "gate_up_proj",
        "down_proj",
        "lm_head",
        "embed_tokens",
        "token_adapter",
        "x|y",
        "a+b",
        "ü",
        "_orig_mod",
    ]
)
path = st.lists(word, min_size=1, max_size=4).map(".".join) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="."), min_size=1, max_size=5
)
size = st.integers(1, 5)


@st.composite
def shapes(draw: st.DrawFn, kinds: tuple[str, ...] = ("linear", "embedding", "conv", "parameter")) -> Shape:
    kind = draw(st.sampled_from(kinds))
    out, in_ = draw(size), draw(size)
    if kind == "conv":
        kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
        batch = draw(st.sampled_from([(), (), (2,)]))
        return Shape("conv", out, in_ * torch.Size(kernel).numel(), batch, kernel)
    if kind == "parameter":
        batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
        vector = not batch and draw(st.booleans())
        return (
            Shape("parameter", out, 1, (), (), (out,))
            if vector
            else Shape("parameter", out, in_, batch, (), (*batch, out, in_))
        )
    return Shape(kind, out, in_)  # type: ignore[arg-type]


@st.composite
def loras(draw: st.DrawFn, **fixed: object) -> LoRA:
    settings = {
        "r": draw(st.integers(1, 3)),
        "alpha": draw(st.sampled_from([1, 8.0, 0.3, 16])),
        "scaling": draw(st.sampled_from(["lora", "rslora"])),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "init": draw(st.sampled_from(["kaiming", "gaussian"])),
        "bias": draw(st.booleans()),
    }
    return LoRA(**{**settings, **fixed})  # type: ignore[arg-type]


@st.composite
def states(draw: st.DrawFn) -> AdapterState:
    """Any mix of methods, shapes and dtypes, sensible to PEFT or not; one shared LoRA setting makes half of them so."""
    shared = draw(st.booleans())
    one = draw(loras())
    methods: dict[str, Method] = {}
    where: dict[str, Shape] = {}
    for name in draw(st.lists(path, unique=True, max_size=6)):
        kind = draw(st.sampled_from(["lora", "lora", "lora", "dora", "full", "rows", "bitfit"]))
        if kind in ("lora", "dora"):
            where[name] = draw(shapes())
            fixed = {k: getattr(one, k) for k in ("scaling", "dropout", "init", "bias")} if shared else {}
            lora = draw(loras(**fixed))
            methods[name] = DoRA(lora) if kind == "dora" else lora
        elif kind == "rows":
            where[name] = draw(shapes(("embedding", "linear")))
            methods[name] = TokenRows(
                tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True)))
            )
        else:
            where[name] = draw(shapes(("parameter",)))
            methods[name] = BitFit() if kind == "bitfit" else FullFineTuning()
    tensors = {}
    for name, method in methods.items():
        dtype = draw(st.sampled_from(DTYPES))
        tensors[name] = {n: torch.randn(s).to(dtype) for n, s in method.shapes(where[name]).items()}
        if "lora_A" in tensors[name] and where[name].lookup:  # laid out as attach keeps it
            tensors[name]["lora_A"] = tensors[name]["lora_A"].mT.contiguous().mT
    info = draw(
        st.dictionaries(
            st.sampled_from(["task", "peft", "tool"]),
            st.sampled_from(["x", None, 3, 0.1, [1, "ü"], {"a": {}}]),
            max_size=2,
        )
    )
    return AdapterState(AdapterSpec(methods, where, draw(st.sampled_from([None, "org/base"])), info), tensors)


@settings(max_examples=120, deadline=None)
@given(states())
def test_any_adapter(state: AdapterState) -> None:
    with tempfile.TemporaryDirectory() as directory:
        assert_equal(read(write(state, Path(directory) / "a")), state)


@st.composite
def peft_states(draw: st.DrawFn) -> AdapterState:
    """Adapters that PEFT can hold, with every rule in play."""
    one = draw(loras(bias=False))
    form = draw(st.sampled_from(["plain", "dora", "bare"]))
    if form != "plain":
        one = LoRA(one.r, one.alpha, one.scaling, 0.0, one.init)
    alphas, ranks = st.sampled_from([4, 8, 0.5]), st.integers(1, 3)

    def method() -> Method:
        lora = LoRA(draw(ranks), draw(alphas), one.scaling, one.dropout, one.init)
        return DoRA(lora) if form == "dora" else lora

    methods: dict[str, Method] = {}
    where: dict[str, Shape] = {}

    def put(path: str, method: Method, shape: Shape) -> None:
        methods[path], where[path] = method, shape

    parts = ["layer", "layer", "norm", "bias", "rows", "table"] + (
        ["attention", "experts"] if form == "bare" else []
    )
    put("first.fc", method(), Shape("linear", draw(size), draw(size)))
    for n, part in enumerate(draw(st.lists(st.sampled_from(parts), max_size=7))):
        at, out, in_ = f"layers.{n}", draw(size), draw(size)
        if part == "layer":
            shape = draw(shapes(("linear", "embedding", "conv")))
            name = f"{at}.{draw(st.sampled_from(['fc', 'q_proj', 'wte', 'attn.out_proj']))}"
            put(name, method(), Shape(shape.kind, shape.out, shape.in_, (), shape.kernel))
            if draw(st.booleans()):
                put(f"{name}.bias", FullFineTuning(), Shape("parameter", out, 1, stored=(out,)))
        elif part == "norm":
            put(f"{at}.norm.weight", FullFineTuning(), draw(shapes(("parameter",))))
            if draw(st.booleans()):
                put(f"{at}.norm.bias", FullFineTuning(), draw(shapes(("parameter",))))
        elif part == "bias":
            put(f"{at}.head.bias", FullFineTuning(), Shape("parameter", out, 1, stored=(out,)))
        elif part == "rows":
            put(
                f"{at}.wte",
                TokenRows(tuple(range(draw(st.integers(1, 3))))),
                Shape("embedding", out, draw(st.integers(3, 9))),
            )
        elif part == "table":
            put(f"{at}.wte", method(), Shape("embedding", out, in_))
            put(f"{at}.wte.weight", FullFineTuning(), Shape("parameter", in_, out, stored=(in_, out)))
        elif part == "attention":
            both = method()
            put(f"{at}.attn.in_proj_weight", both, Shape("parameter", 3 * out, out, stored=(3 * out, out)))
            put(f"{at}.attn.out_proj", both, Shape("linear", out, out))
        else:
            for name in ("down_proj", "gate_up_proj"):
                experts = (draw(st.integers(2, 3)),)
                put(
                    f"{at}.mlp.{name}",
                    method(),
                    Shape("parameter", out, in_, experts, stored=(*experts, out, in_)),
                )
    dtype = draw(st.sampled_from(DTYPES))
    tensors = {
        p: {n: torch.randn(s).to(dtype) for n, s in m.shapes(where[p]).items()} for p, m in methods.items()
    }
    return AdapterState(AdapterSpec(methods, where), tensors)


@settings(max_examples=120, deadline=None)
@given(peft_states())
def test_adapters_that_peft_can_hold(state: AdapterState) -> None:
    """Read again also without what we add to the weights: as from a file that PEFT wrote."""
    assert why_not_peft(state) == []
    with tempfile.TemporaryDirectory() as directory:
        assert_equal(read(write(state, directory)), state)
        file = Path(directory) / "adapter_model.safetensors"
        save_file(load_file(file), file, {"format": "pt"})
        again = read(directory)
    known = {
        p: state.spec.shapes[p] if isinstance(m, TokenRows) else again.spec.shapes[p]
        for p, m in again.spec.methods.items()
    }
    assert_equal(AdapterState(AdapterSpec(again.spec.methods, known), again.tensors), state)
