"""The layers of known architectures, found by what they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core.architectures import LAYER_NAMES, is_feedforward_down
from lorakit.errors import UnmatchedTargetError

PRESET = "all-keys-values-feedforward"
COUNTS = (
    "num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layers",
)  # fmt: skip
FUSED = {"deberta", "modernbert", "gpt2", "gpt_bigcode", "bloom", "falcon", "gpt_neox", "phi3"}


def one_layer(architecture: str) -> nn.Module:
    """The smallest model of an architecture, on the meta device."""
    from transformers import AutoConfig, AutoModel

    options: dict[str, Any] = {}
    if architecture == "gpt_neo":
        options = {"num_layers": 1, "attention_types": [[["global"], 1]]}
    config = AutoConfig.for_model(architecture, **options)
    for name in COUNTS:
        if architecture != "gpt_neo" and isinstance(getattr(config, name, None), int):
            setattr(config, name, 1)
    with torch.device("meta"):
        return AutoModel.from_config(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", LAYER_NAMES)
def test_keys_values_and_the_way_out_of_the_feed_forward_block(architecture: str) -> None:
    """One feed-forward block a layer, and keys and values, or a fused projection, an attention."""
    model = one_layer(architecture)
    assert model.config.model_type == architecture
    targets = lk.find(model, PRESET)
    down = [t for t in targets if is_feedforward_down(t.path)]
    encoder_decoder = bool(model.config.is_encoder_decoder)
    attentions = 3 if encoder_decoder else 1
    assert len(down) == (2 if encoder_decoder else 1)
    assert len(targets) - len(down) == attentions * (1 if architecture in FUSED else 2)
    width = next(
        getattr(model.config, n)
        for n in ("hidden_size", "d_model", "n_embd", "dim")
        if hasattr(model.config, n)
    )
    assert all(t.out == width < t.in_ for t in down)


def test_the_output_of_attention_is_no_feed_forward_layer() -> None:
    assert is_feedforward_down("encoder.layer.3.output.dense")
    assert not is_feedforward_down("encoder.layer.3.attention.output.dense")
    assert is_feedforward_down("h.0.mlp.c_proj")
    assert not is_feedforward_down("h.0.attn.c_proj")


class Named(nn.Module):
    def __init__(self, model_type: str) -> None:
        super().__init__()
        self.k_proj = nn.Linear(2, 2)
        self.config = type("Config", (), {"model_type": model_type})()


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(
        UnmatchedTargetError, match=r"the architecture 'mamba' is not known\. Name the targets.*llama"
    ):
        lk.find(Named("mamba"), PRESET)


def test_a_known_architecture_without_such_layers_is_refused() -> None:
    with pytest.raises(UnmatchedTargetError, match="found no such layer in Named"):
        lk.find(Named("bert"), PRESET)


def test_other_methods_may_choose_it_in_a_mapping() -> None:
    model = Named("llama")
    lk.attach(model, {PRESET: lk.LoRA(r=1)})
    assert list(lk.extract(model).spec.methods) == ["k_proj"]
