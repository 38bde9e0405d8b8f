"""Models that cannot be served are refused at the start, and the message says what it is about them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from lorakit.errors import ModelError
from lorakit.serve.inspection import inspect_model
from lorakit.serve.transformers_runner import TransformersRunner
from tests.serve.tiny_serving import _SIZES, CONFIGS, decoder_of, tiny_decoder


@pytest.mark.parametrize("name", CONFIGS)
def test_layouts_are_those_of_the_configs(name: str) -> None:
    settings: dict[str, Any] = CONFIGS[name][1]
    layout = inspect_model(tiny_decoder(name))
    assert layout.layers == 2
    assert layout.context == 256
    assert layout.kv_heads == settings.get("num_key_value_heads", 4)
    assert layout.head_dim == settings.get("head_dim", 8)


def test_windows_are_seen_layer_by_layer() -> None:
    assert inspect_model(tiny_decoder("gemma2")).windows == (11, None)
    assert inspect_model(tiny_decoder("mistral-window")).windows == (9, 9)
    assert inspect_model(tiny_decoder("llama")).windows == (None, None)


def mixed_layers() -> Any:
    return transformers.Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"])


REFUSED = {
    "alibi": (
        lambda: transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
        "never calls transformers' attention interface",
    ),
    "state space": (
        lambda: transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2),
        "never calls transformers' attention interface",
    ),
    "sinks": (
        lambda: transformers.GptOssConfig(**_SIZES, head_dim=16, num_local_experts=2, num_experts_per_tok=1),
        "s_aux",
    ),
    "convolutions between": (mixed_layers, "attention ran in 1"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_packed_is_refused_with_the_reason(kind: str) -> None:
    config, reason = REFUSED[kind]
    with pytest.raises(ModelError, match=reason):
        TransformersRunner(decoder_of(config()), kv_tokens=512)


def test_an_encoder_decoder_is_refused() -> None:
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=99, d_model=16, num_layers=1)
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        TransformersRunner(model, kv_tokens=512)


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="causal language model"):
        TransformersRunner(tiny_decoder("llama").model, kv_tokens=512)


def test_a_model_that_mixes_tokens_elsewhere_is_found_out() -> None:
    model = tiny_decoder("llama")

    def look_ahead(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + output.mean(1, keepdim=True)  # of the whole row, so of other requests too

    model.model.layers[0].mlp.register_forward_hook(look_ahead)
    with pytest.raises(ModelError, match="mixes tokens outside its attention"):
        TransformersRunner(model, kv_tokens=512)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_text_shorten_the_context(kind: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {}
    rope = {
        "rope_type": kind, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128, **factors,
    }  # fmt: skip
    layout = inspect_model(decoder_of(transformers.LlamaConfig(**_SIZES, rope_parameters=rope)))
    assert layout.context == 128
