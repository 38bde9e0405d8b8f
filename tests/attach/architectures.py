"""Tiny models of real classes, made from their configurations: a few thousand random numbers each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn


def ids(rows: int = 3, length: int = 5) -> Tensor:
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(0))


def causal(config: Any, **settings: Any) -> nn.Module:
    return hf.AutoModelForCausalLM.from_config(config, **settings).eval()


def llama(**settings: Any) -> nn.Module:
    return causal(
        hf.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, **settings,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    return causal(
        hf.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
        )
    )


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(
        hf.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=3,
        )
    ).eval()


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    ).eval()


def vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    ).eval()


def whisper() -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=4, max_source_positions=8,
            max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    ).eval()  # fmt: skip


def mixtral() -> nn.Module:
    return causal(
        hf.MixtralConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def qwen_moe() -> nn.Module:
    return causal(
        hf.Qwen2MoeConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, moe_intermediate_size=12,
            shared_expert_intermediate_size=12, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def run_text(model: nn.Module) -> Tensor:
    return model(input_ids=ids()).logits


def run_t5(model: nn.Module) -> Tensor:
    return model(input_ids=ids(), decoder_input_ids=ids(3, 4)).logits


def run_vit(model: nn.Module) -> Tensor:
    return model(pixel_values=torch.linspace(-1, 1, 3 * 3 * 8 * 8).reshape(3, 3, 8, 8)).logits


def run_whisper(model: nn.Module) -> Tensor:
    sound = torch.linspace(-1, 1, 3 * 4 * 16).reshape(3, 4, 16).sin()
    return model(input_features=sound, decoder_input_ids=ids(3, 4)).logits


# name: how to make it, how to run it, and targets beside "all-linear" that are its own
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], list[str]]] = {
    "llama": (llama, run_text, ["embed_tokens", "lm_head"]),
    "gpt2": (gpt2, run_text, ["wte", "wpe", "c_attn"]),
    "bert": (bert, run_text, ["word_embeddings", "query", "classifier"]),
    "t5": (t5, run_t5, ["embed_tokens", "q", "wo", "lm_head"]),
    "vit": (vit, run_vit, ["projection", "classifier"]),
    "whisper": (whisper, run_whisper, ["conv1", "conv2", "embed_tokens", "q_proj", "proj_out"]),
    "mixtral": (mixtral, run_text, ["experts.gate_up_proj", "experts.down_proj", "q_proj"]),
    "qwen-moe": (qwen_moe, run_text, ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]),
}
