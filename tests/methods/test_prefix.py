"""Prefix tuning: counts, starts, the training network, and PEFT's numbers."""

from __future__ import annotations

import pytest
import torch

import lorakit as lk
from lorakit.core import Shape
from lorakit.errors import ConfigError, UnmatchedTargetError, UnsupportedTargetError
from tests.attach.architectures import t5
from tests.attach.readers import READERS, reader, texts


@pytest.mark.parametrize("name", READERS)
def test_it_has_two_numbers_for_each_layer_position_and_width(name: str) -> None:
    """``2 L l d`` (Li and Liang 2021), with ``d`` the width of the key heads."""
    model = reader(name)
    width = 8 if name in ("llama", "qwen2", "mistral") else 16  # two of four heads of width four
    layers = model.config.num_hidden_layers
    report = lk.attach(model, lk.PrefixTuning(length=7))
    assert report.parameters == report.trainable == 2 * layers * 7 * width
    assert [site.kind for site in report.sites] == ["attention"] * layers


def test_gpt2_medium_has_the_papers_quarter_million_a_prefix_of_five() -> None:
    """``2 L l d`` with 24 layers of width 1,024 and 5 positions, counted from shapes alone."""
    sizes = lk.PrefixTuning(length=5).shapes(Shape("attention", out=1024, in_=1024))
    assert 24 * sum(a * b for a, b in sizes.values()) == 245_760


def test_the_network_is_counted_once_and_plain_leaves_it_out() -> None:
    model = reader("llama")
    report = lk.attach(model, lk.PrefixTuning(length=3, mlp=5), seed=0)
    shared, own = 3 * 8 + 5 * 8 + 5, 2 * (8 * 5 + 8)
    assert report.shared == shared
    assert report.parameters == shared + 2 * own
    state = lk.extract(model)
    plain = state.plain()
    assert plain.numel == 2 * 2 * 3 * 8
    assert plain.shared == {}
    assert plain.plain() is plain
    (ids,) = texts(5)
    with torch.no_grad():
        before = model(input_ids=ids[None]).logits
        lk.detach(model)
        lk.attach(model, plain)
        torch.testing.assert_close(model(input_ids=ids[None]).logits, before, rtol=0, atol=1e-6)


def test_the_network_is_the_one_of_the_paper() -> None:
    """``K tanh(H e + h) + k0``, against torch's own layers."""
    method, shape = lk.PrefixTuning(length=4, mlp=6, width=5), Shape("attention", out=8, in_=8)
    draw = torch.Generator().manual_seed(0)
    p = {
        name: torch.randn(size, generator=draw)
        for name, size in (method.shapes(shape) | method.shared_shapes()).items()
    }
    first, last = torch.nn.Linear(5, 6), torch.nn.Linear(6, 16)
    with torch.no_grad():
        first.weight.copy_(p["hidden"])
        first.bias.copy_(p["hidden_bias"])
        last.weight.copy_(torch.cat([p["out_k"], p["out_v"]]))
        last.bias.copy_(torch.cat([p["out_k_bias"], p["out_v_bias"]]))
        expected = last(torch.tanh(first(p["embedding"])))
    keys, values = method.keys_values(shape, p)
    torch.testing.assert_close(torch.cat([keys, values], dim=1), expected)


def test_the_width_of_the_embedding_is_that_of_the_widest_keys() -> None:
    shapes = {"a": Shape("attention", out=8, in_=8), "b": Shape("attention", out=12, in_=8)}
    assert lk.PrefixTuning(mlp=4).for_targets(shapes).width == 12
    assert lk.PrefixTuning(mlp=4, width=3).for_targets(shapes).width == 3
    assert lk.PrefixTuning().for_targets(shapes).width == 0


@pytest.mark.parametrize("mlp", [0, 64])
def test_starts(mlp: int) -> None:
    model = reader("gpt2")
    lk.attach(model, lk.PrefixTuning(length=40, mlp=mlp), name="normal", seed=0)
    lk.attach(model, lk.PrefixTuning(length=40, mlp=mlp, init="zero"), name="zero", seed=0)
    drawn = lk.extract(model, "normal")
    named = {f"{path}|{name}": t for path, name, t in drawn.all_tensors()}
    for key, value in named.items():
        if key.endswith(("prefix_k", "prefix_v", "embedding")):
            assert abs(value.std() - 1) < 0.1
        else:
            bound = (64 if "out_" in key else 16) ** -0.5
            assert 0.9 * bound < value.abs().max() <= bound
    for group in lk.extract(model, "zero").plain().tensors.values():
        assert all(not t.any() for t in group.values())


def test_the_same_seed_gives_the_same_start() -> None:
    first, second = (reader("llama") for _ in range(2))
    for model in (first, second):
        lk.attach(model, lk.PrefixTuning(length=3, mlp=4), seed=5)
    for one, other in zip(lk.extract(first).all_tensors(), lk.extract(second).all_tensors(), strict=True):
        assert torch.equal(one[2], other[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length must be a whole number of at least 1"),
        ({"length": 2.5}, "length must be"),
        ({"mlp": -1}, "mlp must be"),
        ({"width": 4}, "set mlp too"),
        ({"init": "ones"}, "No init of a prefix is called 'ones'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lk.PrefixTuning(**settings)  # type: ignore[arg-type]


def test_what_it_cannot_adapt_says_why() -> None:
    with pytest.raises(UnsupportedTargetError, match="T5Attention adds a bias for each pair"):
        lk.attach(t5(), lk.PrefixTuning())
    with pytest.raises(UnmatchedTargetError, match="has no attention that lorakit knows"):
        lk.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), lk.PrefixTuning())
    with pytest.raises(UnmatchedTargetError, match="it adapts 'all-attention'"):
        lk.attach(reader("llama"), lk.PrefixTuning(), "all-linear")
    with pytest.raises(UnmatchedTargetError, match="does not adapt"):
        lk.attach(reader("llama"), lk.LoRA(), "all-attention")
