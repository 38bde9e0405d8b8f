"""Tiny transformers with weights large enough that attention looks at some tokens more than at others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import lorakit as lk
from tests.attach import architectures

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
DECODER: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def qwen2() -> nn.Module:
    return architectures.causal(hf.Qwen2Config(**DECODER))


def mistral() -> nn.Module:
    """Each token sees the four before it."""
    return architectures.causal(hf.MistralConfig(**DECODER, sliding_window=4))


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZES, **STILL, num_labels=3))


def roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES, **STILL, num_labels=3))


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": architectures.llama,
    "qwen2": qwen2,
    "mistral": mistral,
    "gpt2": architectures.gpt2,
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "roberta": roberta}
READERS = {**DECODERS, **ENCODERS}


def reader(name: str, attention: str = "sdpa") -> nn.Module:
    """One of them, in eval mode, always with the same numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = READERS[name]().eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(6)
    return model


def adapted(name: str, method: lk.PrefixTuning | lk.PromptTuning, attention: str = "sdpa") -> nn.Module:
    """The same with an adapter called ``a``."""
    model = reader(name, attention)
    lk.attach(model, method, name="a", seed=3)
    return model


def stock(model: nn.Module) -> nn.Module:
    """A copy without adapters."""
    plain = copy.deepcopy(model)
    lk.detach(plain)
    return plain


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """Rows of ids as one batch with its mask."""
    longest = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        pad, ones = torch.zeros(longest - len(row), dtype=torch.long), torch.ones(len(row), dtype=torch.long)
        ids.append(torch.cat([pad, row] if side == "left" else [row, pad]))
        mask.append(torch.cat([pad, ones] if side == "left" else [ones, pad]))
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(mask)}


def texts(*lengths: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(3, 50, (n,), generator=draw) for n in lengths]


def generate(model: nn.Module, batch: dict[str, Tensor], **settings: Any) -> Tensor:
    return model.generate(
        **batch, max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=0, **settings
    )


def answer(model: nn.Module, batch: dict[str, Tensor], **settings: Any) -> Tensor:
    """What was added."""
    return generate(model, batch, **settings)[:, batch["input_ids"].shape[1] :]
