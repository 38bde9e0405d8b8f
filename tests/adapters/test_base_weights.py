"""Base weights from a checkpoint, as the methods see them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorakit as lk
from lorakit.adapters.base_weights import BaseWeights
from lorakit.adapters.checkpoints import CONV1D
from lorakit.attach.attachments import attachments_of
from lorakit.errors import ConfigError
from lorakit.io.checkpoint import Checkpoint
from tests.adapters.states import linear, random_state


class Base(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.table = nn.Embedding(11, 4)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.fused = nn.Linear(6, 12)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_as_the_targets_of_the_model_give_them(tmp_path: Path) -> None:
    model = Base()
    save_file(
        {name: t.detach().clone() for name, t in model.named_parameters()}, tmp_path / "model.safetensors"
    )
    names = ["linear", "table", "conv", "fused[0:4]", "fused[8:12]", "experts"]
    lk.attach(model, lk.LoRA(r=2), targets=names, name="a")
    state = lk.extract(model, "a")
    found = BaseWeights(Checkpoint(tmp_path), state)
    assert set(found) == set(names) == set(state.spec.methods)
    assert not found.missing
    for slot in attachments_of(model).slots:
        assert torch.equal(found[slot.target.path], slot.target.weight())


def test_layers_that_are_stored_transposed() -> None:
    wide, square = torch.randn(6, 9), torch.randn(6, 6)
    tensors = {"h.0.c_attn.weight": wide, "h.0.c_proj.weight": square}
    shapes = {"h.0.c_attn": linear(9, 6), "h.0.c_proj": linear(6, 6), "h.0.c_attn[k]": linear(3, 6)}
    state = random_state(dict.fromkeys(shapes, lk.LoRA(r=1)), shapes)
    found = BaseWeights(tensors, state, transposed=CONV1D)
    assert torch.equal(found["h.0.c_attn"], wide.T)
    assert torch.equal(found["h.0.c_proj"], square.T)
    assert torch.equal(found["h.0.c_attn[k]"], wide.T[3:6])
    assert torch.equal(BaseWeights(tensors, state)["h.0.c_proj"], square)


def test_prefixes() -> None:
    W = torch.randn(5, 6)
    state = random_state({"bert.layer.0.q": lk.LoRA(r=1)}, {"bert.layer.0.q": linear(5, 6)})
    assert torch.equal(BaseWeights({"layer.0.q.weight": W}, state)["bert.layer.0.q"], W)
    state = random_state({"layer.0.q": lk.LoRA(r=1)}, {"layer.0.q": linear(5, 6)})
    assert torch.equal(BaseWeights({"bert.layer.0.q.weight": W}, state)["layer.0.q"], W)
    two = BaseWeights({"a.layer.0.q.weight": W, "b.layer.0.q.weight": W}, state)
    assert not two
    assert two.missing == {"layer.0.q": "no tensor 'layer.0.q.weight'"}


def test_what_is_not_there_is_told() -> None:
    shapes = {"q": linear(5, 6), "qkv[gate]": linear(5, 6)}
    state = random_state(dict.fromkeys(shapes, lk.LoRA(r=1)), shapes)
    found = BaseWeights({"qkv.weight": torch.randn(10, 6)}, state)
    assert found.missing == {
        "q": "no tensor 'q.weight'",
        "qkv[gate]": "which rows [gate] is cannot be told from the checkpoint",
    }
    assert len(found) == 0


def test_another_base_is_refused() -> None:
    state = random_state({"q": lk.LoRA(r=1)}, {"q": linear(5, 6)})
    for wrong in (torch.randn(5, 7), torch.randn(30), torch.randn(10, 6)):
        with pytest.raises(ConfigError, match="belongs to another base model"):
            BaseWeights({"q.weight": wrong}, state)["q"]
