"""The smallest models of transformers that have attentions: a decoder with grouped heads, GPT-2, an encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}


class Reader(nn.Module):
    """A model around the backbone of a transformer, which reads token ids."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input_ids=x, use_cache=False).last_hidden_state


def llama() -> Reader:
    """Rotary positions, four heads of queries and two of keys. Its norms would round float64 numbers to float32."""
    from transformers import LlamaConfig, LlamaModel
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    model = LlamaModel(LlamaConfig(**SIZES, intermediate_size=12, num_key_value_heads=2))
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LlamaRMSNorm):
                setattr(parent, name, nn.RMSNorm(SIZES["hidden_size"], eps=child.variance_epsilon))
    return Reader(_spread(model))


def gpt2() -> Reader:
    """Learned positions, and one projection for queries, keys and values."""
    from transformers import GPT2Config, GPT2Model

    still = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0}
    return Reader(_spread(GPT2Model(GPT2Config(**SIZES, n_inner=12, **still))))


def bert() -> Reader:
    """An encoder."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        **SIZES,
        intermediate_size=12,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        _attn_implementation="eager",
    )
    return Reader(_spread(BertModel(config, add_pooling_layer=False)))


def _spread(model: nn.Module) -> nn.Module:
    """Larger weights than those that training starts from: or all attention would be even, and no test would see it."""
    for p in model.parameters():
        if p.dim() == 2:
            p.data *= 12
    return model
