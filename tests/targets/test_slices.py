"""Slices of fused weights: loralib's MergedLinear, any rows, and several adapters on one weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.attach.attachments import attachments_of
from lorakit.errors import UnmatchedTargetError, UnsupportedTargetError
from lorakit.io import why_not_peft
from lorakit.targets import SliceTarget

IN, WIDTH = 6, 4


class Fused(nn.Module):
    """q, k and v in one layer, four rows each."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.qkv = layer or nn.Linear(IN, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, IN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(WIDTH, -1)
        return self.out(torch.tanh(q) * k + v)


def rows(part: int) -> str:
    return f"qkv[{part * WIDTH}:{(part + 1) * WIDTH}]"


def randomise(model: nn.Module, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.normal_(generator=draw)


def merged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: list[Tensor],
    B: list[Tensor],
    enable: list[bool],
    scale: float,
) -> Tensor:
    """MergedLinear of loralib: the base, and in each enabled block the change of its own pair of factors."""
    blocks = []
    factors = iter(zip(A, B, strict=True))
    for on, W, b in zip(enable, weight.chunk(len(enable)), bias.chunk(len(enable)), strict=True):
        block = x @ W.T + b
        if on:
            a, up = next(factors)
            block = block + scale * (x @ a.T) @ up.T
        blocks.append(block)
    return torch.cat(blocks, -1)


@pytest.mark.parametrize("enable", [[True, False, True], [False, True, False], [True, True, True]], ids=str)
def test_it_is_merged_linear(enable: list[bool]) -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(IN, 3 * WIDTH)}).double()
    x = torch.randn(5, IN, dtype=torch.float64)
    base = model["qkv"](x).detach()
    on = [i for i in range(3) if enable[i]]
    report = lk.attach(model, lk.LoRA(r=2, alpha=6), targets=[rows(i) for i in on])
    assert report.parameters == 2 * len(on) * (IN + WIDTH)  # r * n_on * (i + o / n)
    randomise(model)
    p = lk.trainable(model)
    A, B = ([t for name, t in p.items() if name.endswith(key)] for key in ("lora_A", "lora_B"))
    layer = model["qkv"]
    expected = merged_linear(x, layer.weight, layer.bias, A, B, enable, 3.0)  # type: ignore[arg-type]
    for y in (model["qkv"](x), torch.no_grad()(model["qkv"])(x)):
        torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
        for i in set(range(3)) - set(on):
            block = slice(i * WIDTH, (i + 1) * WIDTH)
            assert torch.equal(y[:, block], base[:, block])


def test_mask_101_is_two_lora_linears_and_a_frozen_one_to_the_bit() -> None:
    """Blockwise: each slice computes exactly what a LoRA on a separate layer with its rows computes."""
    torch.manual_seed(0)
    fused = nn.ModuleDict({"qkv": nn.Linear(IN, 3 * WIDTH)})
    parts = nn.ModuleDict({name: nn.Linear(IN, WIDTH) for name in "qkv"})
    with torch.no_grad():
        for i, name in enumerate("qkv"):
            block = slice(i * WIDTH, (i + 1) * WIDTH)
            parts[name].weight.copy_(fused["qkv"].weight[block])  # type: ignore[operator, index]
            parts[name].bias.copy_(fused["qkv"].bias[block])  # type: ignore[operator, index]
    lk.attach(fused, lk.LoRA(r=2), targets=[rows(0), rows(2)])
    lk.attach(parts, lk.LoRA(r=2), targets=["q", "v"])
    randomise(fused)
    randomise(parts)
    x = torch.randn(7, IN)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            delta = fused["qkv"](x) - nn.functional.linear(x, fused["qkv"].weight, fused["qkv"].bias)  # type: ignore[arg-type]
            for i, name in enumerate("qkv"):
                alone = parts[name](x) - nn.functional.linear(x, parts[name].weight, parts[name].bias)  # type: ignore[arg-type]
                block = delta[:, i * WIDTH : (i + 1) * WIDTH]
                torch.testing.assert_close(block, alone, rtol=0, atol=1e-6)
                assert name != "k" or torch.equal(block, torch.zeros_like(block))
    for state, where in ((lk.extract(fused), {"q": rows(0), "v": rows(2)}), (lk.extract(parts), None)):
        paths = where or {"q": "q", "v": "v"}
        assert list(state.tensors) == [paths["q"], paths["v"]]
    with torch.no_grad():
        B, A = (lk.extract(fused).tensors[rows(0)][name] for name in ("lora_B", "lora_A"))
        lk.merge(fused)
        lk.merge(parts)
        stacked = torch.cat([parts[name].weight for name in "qkv"])
        assert torch.equal(fused["qkv"].weight, stacked)  # type: ignore[arg-type]
        assert B.shape == (WIDTH, 2)
        assert A.shape == (2, IN)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in held:
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.parametrize("rows_of_batch", [7, 4096])
@pytest.mark.parametrize("names", [[rows(0), rows(2)], ["qkv[0:2,4:6,8:10]"]], ids=["blocks", "interleaved"])
def test_the_whole_output_is_never_copied(names: list[str], rows_of_batch: int) -> None:
    model = Fused()
    lk.attach(model, lk.LoRA(r=2), targets=names)
    randomise(model)
    slots = attachments_of(model).slots
    x, y = torch.randn(rows_of_batch, 2, IN), torch.randn(rows_of_batch, 2, 3 * WIDTH)
    before = y.clone()
    with torch.no_grad(), Largest() as largest:
        for slot in slots:
            assert slot.adapt_output(x, y) is y
    assert 0 < largest.numel <= y.numel() // (3 if len(names) == 2 else 2)
    assert not torch.equal(y, before)
    with torch.no_grad():
        for slot in slots:
            before = slot.target.insert(before, slot.target.apply(x, _new(slot)) + slot.target.select(before))
    torch.testing.assert_close(y, before)


def _new(slot: Any) -> Tensor:
    adapter = slot.adapter("default")
    return adapter.method.delta(slot.target, adapter._parameters)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(IN, 12), lambda: Conv1D(12, IN)], ids=["linear", "conv1d"]
)
@pytest.mark.parametrize(
    "names", [["qkv[0:6]", "qkv[4:12]"], ["qkv[2:5]", "qkv"], ["qkv[0:2,6:8]", "qkv[1:7]"]], ids=str
)
def test_additive_changes_of_overlapping_slices_add_up(layer: Any, names: list[str]) -> None:
    model = Fused(layer()).double()
    x = torch.randn(3, IN, dtype=torch.float64)
    base = model.qkv(x).detach()
    lk.attach(model, lk.LoRA(r=2), targets=names)
    randomise(model)
    expected = base.clone()
    for slot in attachments_of(model).slots:
        part = slot.target.select(expected) + slot.target.apply(x, _new(slot)).detach()
        expected = slot.target.insert(expected, part)
    torch.testing.assert_close(model.qkv(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.qkv(x), expected)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lk.merge(model)
    torch.testing.assert_close(model.qkv(x), expected)
    lk.unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_overlapping_slices_of_a_bound_parameter_are_each_measured_from_the_base() -> None:
    """Also for methods that are not additive: what is read is put together before anything is computed with it."""
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(IN, 2, bias=False)}).double()
    weight = model["attn"].in_proj_weight.detach().clone()  # type: ignore[operator, union-attr]
    lk.attach(model, lk.DoRA(lk.LoRA(r=2)), targets=["in_proj_weight[q,k]"], name="a")
    lk.attach(model, lk.FullFineTuning(), targets=["in_proj_weight[k]"], name="b")
    randomise(model)
    changed = {}
    for name in "ab":
        with lk.use(model, name):
            changed[name] = model["attn"].in_proj_weight.detach() - weight  # type: ignore[operator]
            assert torch.equal(changed[name][2 * IN :], torch.zeros(IN, IN))
    assert changed["a"][: 2 * IN].abs().min() > 0
    assert torch.equal(changed["b"][:IN], torch.zeros(IN, IN))
    with lk.use(model, {"a": 0.5, "b": 2.0}):
        mixed = model["attn"].in_proj_weight.detach()  # type: ignore[union-attr]
    torch.testing.assert_close(mixed, weight + 0.5 * changed["a"] + 2 * changed["b"])


def test_a_change_that_is_not_additive_may_not_overlap_another_slice() -> None:
    dora = lk.DoRA(lk.LoRA(r=2))
    for first, second in (
        (("qkv[0:6]", dora), ("qkv[4:8]", lk.LoRA(r=2))),
        (("qkv[0:6]", lk.LoRA(r=2)), ("qkv", dora)),
        (("qkv", lk.LoRA(r=2)), ("qkv[0:6]", dora)),
        (("qkv[0:6]", dora), ("qkv.weight[4:8]", lk.FullFineTuning())),
    ):
        model = Fused()
        lk.attach(model, first[1], targets=[first[0]], name="a")
        before = list(model.state_dict())
        with pytest.raises(UnsupportedTargetError, match=r"qkv.*Choose one"):
            lk.attach(model, second[1], targets=[second[0]], name="b")
        with pytest.raises(UnsupportedTargetError, match="Choose one"):
            lk.attach(Fused(), {first[0]: first[1], second[0]: second[1]})
        assert list(model.state_dict()) == before
    model = Fused()
    lk.attach(model, dora, targets=["qkv[0:4]"], name="a")
    lk.attach(model, dora, targets=["qkv[4:8]"], name="b")
    lk.attach(model, lk.FullFineTuning(), targets=["qkv.weight[8:12]"], name="c")


def test_each_slice_can_have_a_method_of_its_own() -> None:
    model = Fused().double()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    base = model.qkv(x).detach()
    lk.attach(model, {rows(0): lk.LoRA(r=2), rows(1): lk.DoRA(lk.LoRA(r=1)), "qkv.bias[8:12]": lk.BitFit()})
    assert torch.equal(model.qkv(x), base)
    randomise(model)
    y = model.qkv(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lk.trainable(model).values())
    lk.merge(model)
    torch.testing.assert_close(model.qkv(x), y)


def test_what_is_written_is_what_is_reported() -> None:
    model = Fused()
    report = lk.attach(
        model, lk.LoRA(r=1, rank_pattern={"qkv[4:8]": 3}), targets=["qkv[4:8]", "qkv[ 8:10, 0:2 ]"]
    )
    assert [(site.path, site.rank) for site in report.sites] == [("qkv[4:8]", 3), ("qkv[8:10,0:2]", 1)]
    assert "qkv[4:8]" in str(report)
    assert "qkv.lorakit.output[4:8].default.lora_A" in model.state_dict()
    (target,) = lk.find(model, [rows(1)])
    assert isinstance(target, SliceTarget)
    assert torch.equal(target.weight(), model.qkv.weight[WIDTH : 2 * WIDTH])
    assert target.bias is not None
    assert torch.equal(target.bias, model.qkv.bias[WIDTH : 2 * WIDTH])
    stored = model.qkv.weight.detach().clone()
    assert torch.equal(target.replaced(stored, target.to_matrix(stored)), stored)
    assert torch.equal(target.to_matrix(target.from_matrix(target.weight())), target.weight())


def test_an_adapter_of_slices_is_saved_and_says_why_not_for_peft(tmp_path: Path) -> None:
    model = Fused()
    lk.attach(model, {rows(0): lk.LoRA(r=2), "qkv.weight[4:6]": lk.FullFineTuning(), "out": lk.LoRA(r=1)})
    randomise(model)
    x = torch.randn(3, IN)
    y = model(x)
    assert "PEFT adapts whole layers and parameters, and 'qkv[0:4]' is a slice of one" in why_not_peft(
        lk.extract(model)
    )
    lk.save(model, tmp_path)
    lk.detach(model)
    assert list(lk.read(tmp_path).tensors) == [rows(0), "qkv.weight[4:6]", "out"]
    lk.load(model, tmp_path)
    assert torch.equal(model(x), y)
    other = Fused(nn.Linear(IN, 3))
    with pytest.raises(UnsupportedTargetError, match=r"not a range of the 3|does not name some of its 3"):
        lk.load(other, tmp_path)


def test_the_rows_of_a_batch_can_have_slices_of_their_own() -> None:
    model = Fused().double()
    lk.attach(model, lk.LoRA(r=2), targets=[rows(0), rows(2)], name="a", seed=0)
    lk.attach(model, lk.DoRA(lk.LoRA(r=2)), targets=[rows(1)], name="b", seed=0)
    randomise(model)
    x = torch.randn(3, 2, IN, dtype=torch.float64)
    routes = ["a", "b", {"a": 0.5, "b": 2.0}]
    expected = []
    for i, route in enumerate(routes):
        with lk.use(model, route):
            expected.append(model(x[i : i + 1]))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), lk.use(model, rows=routes):
            torch.testing.assert_close(model(x), torch.cat(expected))


def test_slices_are_excluded_with_their_layer_or_by_name() -> None:
    names = [rows(0), rows(2), "out"]
    assert [t.path for t in lk.find(Fused(), names, exclude=["qkv"])] == ["out"]
    assert [t.path for t in lk.find(Fused(), names, exclude=[rows(2)])] == [rows(0), "out"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qkv[q]", r"no part 'q': the layout of this layer is not known here; .* as in 'qkv\[0:6\]'"),
        ("qkv[0:13]", "0:13 is not a range of the 12"),
        ("qkv[4:4]", "4:4 is not a range"),
        ("qkv[0:4,2:6]", "overlaps"),
        ("qkv[]", r"matches nothing"),
        ("kqv[0:2]", "matches nothing in this model.*'qkv'"),
        ("norm[0:2]", "matches nothing"),
    ],
)
def test_what_is_no_slice_is_refused(name: str, message: str) -> None:
    with pytest.raises((UnsupportedTargetError, UnmatchedTargetError), match=message):
        lk.find(Fused(), [name])


def test_a_string_is_an_expression_and_the_message_says_how_to_name_a_slice() -> None:
    with pytest.raises(UnmatchedTargetError, match=r"give a list: \['qkv\[0:4\]'\]"):
        lk.find(Fused(), "qkv[0:4]")


def test_only_layers_with_output_rows_have_slices() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "embed": nn.Embedding(5, 4)})
    for name in model:
        with pytest.raises(UnsupportedTargetError, match="only linear layers and bare parameters"):
            lk.find(model, [f"{name}[0:2]"])


@pytest.mark.parametrize("names", [[rows(0)], ["qkv[0:2,4:6,8:10]"]], ids=["block", "interleaved"])
def test_per_example_gradients_through_torch_func(names: list[str]) -> None:
    model = Fused().double()
    lk.attach(model, lk.LoRA(r=2), targets=names)
    randomise(model)
    p = {k: v.detach() for k, v in lk.trainable(model).items()}
    x = torch.randn(3, IN, dtype=torch.float64)

    def loss(p: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (one,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(p, x)
    model(x).square().sum().backward()
    for name, value in lk.trainable(model).items():
        torch.testing.assert_close(each[name].sum(0), value.grad)
