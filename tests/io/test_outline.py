"""What files need to know of a model."""

from __future__ import annotations

import torch
from torch import nn

import lorakit as lk
from lorakit.io import Outline
from lorakit.io.model_outline import outline_of
from tests.io.cases import Mixture, Net, Tied


def test_questions() -> None:
    outline = Outline({"b.gain": (2,), "a.fc.weight": (3, 4), "a.fc.bias": (3,), "scale": ()})
    assert outline.owned == {"b": ["gain"], "a.fc": ["weight", "bias"], "": ["scale"]}
    assert outline.modules == {"a", "a.fc", "b"}
    assert outline.under("a") == ["a.fc.weight", "a.fc.bias"]


def test_of_a_model_with_and_without_adapters() -> None:
    model = Net()
    plain = outline_of(model)
    assert plain.sizes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert plain.embeddings == {"embed_tokens"}
    lk.attach(model, {"fc1": lk.LoRA(r=2), "norm": lk.FullFineTuning()})
    assert outline_of(model) == plain
    assert outline_of(Mixture(is_transposed=True)).transposed == {"mlp.experts"}


def test_shared_parameters_are_listed_under_each_name() -> None:
    sizes = outline_of(Tied(True)).sizes
    assert sizes["lm_head.weight"] == sizes["model.embed_tokens.weight"] == (17, 8)
    assert outline_of(nn.Linear(2, 3)).sizes == {"weight": (3, 2), "bias": (3,)}
    assert isinstance(sizes["lm_head.weight"], tuple)
    assert not isinstance(sizes["lm_head.weight"], torch.Size)
