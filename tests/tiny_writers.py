"""A T5 and a BART of a few kilobytes with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.tiny_chat import tiny_tokenizer


def save_tiny_t5(folder: Path) -> Path:
    """The same random T5 each time."""
    config = T5Config(
        vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=2, pad_token_id=2, eos_token_id=2,
    )  # fmt: skip
    return _save(T5ForConditionalGeneration, config, folder, 1.0)


def save_tiny_bart(folder: Path) -> Path:
    """The same random BART each time."""
    config = BartConfig(
        vocab_size=259, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        dropout=0.0, pad_token_id=2, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=2,
    )  # fmt: skip
    return _save(BartForConditionalGeneration, config, folder, 8.0)


def _save(kind: type[PreTrainedModel], config: object, folder: Path, larger: float) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
        with torch.no_grad():  # BART's small start gives a model that hardly depends on its input
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(larger)
    model.save_pretrained(folder)
    tiny_tokenizer(None).save_pretrained(folder)
    return folder
