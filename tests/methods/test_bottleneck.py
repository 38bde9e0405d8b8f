"""Houlsby, Pfeiffer and parallel adapters: formulas, starts, sizes, counts, and with layer norms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import lorakit as lk
from lorakit.core import Method, Shape, WeightMethod, method_from_json
from lorakit.errors import ConfigError, UnsupportedTargetError
from tests.contracts.pairs import Case, close

ALL = (lk.Houlsby(), lk.Pfeiffer(), lk.ParallelAdapter())


def numel(method: Method, shape: Shape) -> int:
    return sum(math.prod(size) for size in method.shapes(shape).values())


@pytest.mark.parametrize(
    ("r", "count"),
    [(1, 7_078_080), (4, 21_234_432), (8, 40_109_568), (16, 77_859_840), (64, 304_361_472)],
)
def test_the_counts_of_gpt3(r: int, count: int) -> None:
    """LoRA's paper, section 5.1: ``L (2 d r + r + d)`` with two adapters in each of the 96 layers."""
    d, layers = 12_288, 96
    after_attention, after_feed_forward = Shape("linear", out=d, in_=d), Shape("linear", out=d, in_=4 * d)
    method = lk.Houlsby(size=r)
    assert layers * (numel(method, after_attention) + numel(method, after_feed_forward)) == count


def test_the_counts_of_a_bert() -> None:
    """``2 L (2 d m + m + d)`` for Houlsby, ``L (2 d m + m + d)`` for the other two."""
    options = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 20}
    config = transformers.BertConfig(vocab_size=11, **options)
    one = 2 * 32 * 8 + 8 + 32
    for method, count in (
        (lk.Houlsby(size=8), 2 * 3 * one),
        (lk.Pfeiffer(reduction=4), 3 * one),
        (lk.ParallelAdapter(size=8), 3 * one),
    ):
        model = transformers.BertModel(config)
        assert lk.attach(model, method).parameters == count


def test_the_defaults_are_those_of_the_papers() -> None:
    assert (lk.Houlsby().size, lk.Houlsby().activation, lk.Houlsby().init_std) == (64, "gelu", 1e-3)
    assert (lk.Pfeiffer().reduction, lk.Pfeiffer().activation, lk.Pfeiffer().init_std) == (16, "relu", 0.02)
    parallel = lk.ParallelAdapter()
    assert (parallel.size, parallel.scale, parallel.activation) == (512, 4, "relu")
    assert lk.Pfeiffer().shapes(Shape("linear", out=768, in_=3072))["down"] == (48, 768)
    assert lk.Pfeiffer().shapes(Shape("linear", out=8, in_=8))["down"] == (1, 8)


def started(method: Method, width: int = 400) -> dict[str, Tensor]:
    model = nn.ModuleDict({"fc": nn.Linear(width, width)})
    lk.attach(model, method, targets=["fc"], seed=0)
    return {name: t.detach() for name, t in lk.extract(model).tensors["fc"].items()}


def test_the_starts() -> None:
    houlsby = started(lk.Houlsby())
    for name in ("down", "up"):
        assert float(houlsby[name].abs().max()) <= 2e-3  # cut off at two standard deviations
        assert 0.85e-3 < float(houlsby[name].std()) < 0.91e-3  # of a normal cut off there: 0.88 of it
    pfeiffer = started(lk.Pfeiffer())
    for name in ("down", "up"):
        assert abs(float(pfeiffer[name].std()) - 0.02) < 1e-3
        assert float(pfeiffer[name].abs().max()) > 0.05
    parallel = started(lk.ParallelAdapter())
    assert float(parallel["down"].abs().max()) <= 1 / math.sqrt(400)
    assert abs(float(parallel["down"].std()) - 1 / math.sqrt(3 * 400)) < 1e-3
    assert not parallel["up"].any()
    for tensors in (houlsby, pfeiffer, parallel):
        assert not tensors["down_bias"].any()
        assert not tensors["up_bias"].any()


@pytest.mark.parametrize(
    "kind", ["linear", "hfconv1d", "ffn", "ffn-tuple", "ffn-span", "linear-slice", "linear-nf4"]
)
@pytest.mark.parametrize(("setting", "bound"), [("houlsby", 1e-4), ("pfeiffer", 2e-2)])
def test_they_start_near_the_identity_but_not_at_it(setting: str, bound: float, kind: str) -> None:
    case = Case(kind)
    base = case.model(case.x).detach()
    case.attach(setting, random=False)
    moved = float((case.model(case.x).detach() - base).abs().max())
    assert 0 < moved < bound * float(base.abs().max())
    assert not case.method().starts_at_base


@pytest.mark.parametrize("kind", ["linear", "ffn", "ffn-span"])
@pytest.mark.parametrize("first", ["houlsby", "pfeiffer", "parallel"])
def test_a_mix_is_measured_from_the_base_output(first: str, kind: str) -> None:
    case = Case(kind)
    case.attach(first, "a")
    case.attach("lora" if kind == "linear" else "houlsby" if first != "houlsby" else "parallel", "b")
    for weights in ({"a": 0.7, "b": -0.5}, {"a": 1.0, "b": 1.0}, {"a": 0.25}):
        with lk.use(case.model, weights):
            close(case.model(case.x), case.expected(weights), 1e-12)
            with torch.no_grad():
                close(case.model(case.x), case.expected(weights), 1e-12)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
def test_the_activations(activation: str) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(5, 4)}).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    y = model["fc"](x)
    lk.attach(model, lk.Houlsby(size=2, activation=activation), targets=["fc"])
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.normal_()
    p = lk.extract(model).tensors["fc"]
    f = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}[activation]
    expected = y + f(y @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]
    torch.testing.assert_close(model["fc"](x), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lk.Houlsby(size=0), "size must be a whole number of at least 1; got 0"),
        (lambda: lk.Pfeiffer(reduction=1.5), "reduction must be a whole number"),  # type: ignore[arg-type]
        (lambda: lk.Houlsby(init_std=0), "init_std must be a positive number"),
        (lambda: lk.ParallelAdapter(scale=math.inf), "scale must be a finite number"),
        (
            lambda: lk.ParallelAdapter(activation="rely"),
            "No activation is called 'rely'. Did you mean 'relu'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_they_change_no_weight_and_survive_json(method: Method) -> None:
    assert not isinstance(method, WeightMethod)
    assert method_from_json(method.to_json()) == method


def test_layers_that_put_out_no_vectors_are_refused() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "embed": nn.Embedding(5, 4)})
    for name in model:
        with pytest.raises(UnsupportedTargetError, match=r"maps vectors to vectors, which an? .* does not"):
            lk.attach(model, lk.Houlsby(), targets=[name])


def test_the_layer_norms_are_trained_along(tmp_path: Any) -> None:
    """As in Houlsby's paper: one adapter that holds both, is saved as one file, switches as one."""
    options = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 20}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=11, **options)).eval()
    ids = torch.tensor([[3, 1, 4]])
    base = model(ids)[0].detach()
    report = lk.attach(
        model, {"all-block-outputs": lk.Houlsby(size=4), "LayerNorm": lk.FullFineTuning()}, name="a"
    )
    norms = 2 * (1 + 2 * 2) * 32  # scale and shift of the embeddings' and of two in each layer
    assert report.parameters == 2 * 2 * (2 * 32 * 4 + 4 + 32) + norms
    optimizer = torch.optim.Adam(lk.trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(ids)[0] - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    y = model(ids)[0].detach()
    lk.save(model, tmp_path, name="a")
    with lk.use(model, None):
        assert torch.equal(model(ids)[0], base)
    lk.detach(model)
    lk.load(model, tmp_path, name="a")
    torch.testing.assert_close(model(ids)[0], y)


def test_a_file_says_why_peft_has_no_words_for_it(tmp_path: Any) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(5, 4)})
    lk.attach(model, lk.Houlsby(size=2), targets=["fc"])
    from lorakit.io import why_not_peft

    reasons = why_not_peft(lk.extract(model))
    assert any("'houlsby'" in reason for reason in reasons)
    y = model["fc"](torch.ones(5))
    lk.save(model, tmp_path)
    lk.detach(model)
    lk.load(model, tmp_path)
    assert torch.equal(model["fc"](torch.ones(5)), y)
