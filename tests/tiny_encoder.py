"""A BERT of a few kilobytes with a tokenizer of whole words, and texts that it can learn to tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = (
    "cat",
    "dog",
    "cow",
    "oak",
    "elm",
    "fir",
    "red",
    "blue",
    "green",
    "the",
    "a",
    "is",
    "of",
    "and",
    "very",
    "old",
)
KINDS = {"animal": WORDS[:3], "tree": WORDS[3:6], "colour": WORDS[6:9]}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def tiny_word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate((*_SPECIAL, *WORDS))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in _SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )


def save_tiny_encoder(folder: Path, *, pooler: bool = True, **changes: Any) -> Path:
    """The same random encoder each time, without a head."""
    settings = {
        "vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, **changes,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(BertConfig(**settings), add_pooling_layer=pooler)
        with torch.no_grad():  # transformers' small start gives a model that hardly depends on its input
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(8)
        model.save_pretrained(folder)
    tiny_word_tokenizer().save_pretrained(folder)
    return folder


def kind_rows(count: int) -> list[dict[str, str]]:
    """Texts of different lengths whose label is what kind of thing they name."""
    kinds = list(KINDS)
    rows = []
    for i in range(count):
        kind = kinds[i % 3]
        thing = KINDS[kind][(i // 3) % 3]
        filler = " ".join(WORDS[9 + (i * 7 + j) % 7] for j in range(i % 5))
        rows.append({"text": f"{filler} {thing} is old".strip(), "label": kind})
    return rows
