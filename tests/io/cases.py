"""Tiny models and PEFT configurations, one for each rule of the file format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    """An embedding, linear layers with and without bias, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.block = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(8, 12), "fc2": nn.Linear(12, 8, bias=False)}) for _ in range(3)
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.block:
            x = x + layer["fc2"](torch.tanh(layer["fc1"](x)))
        return self.head(self.norm(x))


class Convs(nn.Module):
    """One convolution of each dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 5, (3, 2))
        self.three = nn.Conv3d(2, 4, (1, 2, 3), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.two(self.one(x).unsqueeze(-1).expand(-1, -1, -1, 4))
        return self.three(torch.stack([h, h * 2], 1)[..., :3]).flatten(1)


class Attention(nn.Module):
    """``nn.MultiheadAttention`` beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.attn(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """Three experts in two stacked parameters."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = ((3, 8, 12), (3, 6, 8)) if is_transposed else ((3, 12, 8), (3, 8, 6))
        self.gate_up_proj = nn.Parameter(torch.randn(*up) / 3)
        self.down_proj = nn.Parameter(torch.randn(*down) / 3)

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        up = self.gate_up_proj if self.is_transposed else self.gate_up_proj.mT
        down = self.down_proj if self.is_transposed else self.down_proj.mT
        gate, value = (x.unsqueeze(-3) @ up).chunk(2, -1)
        return ((torch.tanh(gate) * value @ down) * weights.movedim(-1, -2).unsqueeze(-1)).sum(-3)


class Router(nn.Module):
    """A 2-D bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight.mT).softmax(-1)


class Mixture(nn.Module):
    """A router, stacked experts and a linear layer."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"gate": Router(), "experts": Experts(is_transposed)})
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.mlp["experts"](x, self.mlp["gate"](x)))


class Gpt2Like(nn.Module):
    """transformers' ``Conv1D``, which keeps its weight as ``(in, out)``."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.c_attn = Conv1D(12, 8)
        self.c_proj = Conv1D(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(torch.tanh(self.c_attn(x)))


class Tied(nn.Module):
    """A tiny tied or untied Llama."""

    def __new__(cls, tie: bool) -> nn.Module:  # type: ignore[misc]
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, tie_word_embeddings=tie,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, what PEFT is told, and what we should find in its file.

    Attributes:
        model: Builds the base.
        settings: For ``peft.LoraConfig``.
        targets: The targets' paths, in our words, and the methods' names.
        input: For comparing outputs.
    """

    model: Callable[[], nn.Module]
    settings: dict[str, Any]
    targets: dict[str, str]
    input: Callable[[], torch.Tensor] = field(default=lambda: torch.randn(2, 4, 8))

    def base(self) -> nn.Module:
        """The same base model each time."""
        torch.manual_seed(0)
        return self.model().eval()

    def config(self) -> Any:
        """PEFT's configuration."""
        from peft import LoraConfig

        return LoraConfig(**self.settings)

    def adapted(self) -> Any:
        """PEFT's model, with random non-zero weights in the adapter."""
        from peft import get_peft_model

        model = get_peft_model(self.base(), self.config())
        randomise(model)
        return model.eval()


def randomise(model: nn.Module) -> None:
    """Give every tensor that belongs to an adapter a random value."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=generator) * 0.3
            p.data = (p.data * (1 + noise) if "magnitude" in name else p.data + noise).to(p.dtype)


def ids() -> torch.Tensor:
    return torch.tensor([[1, 3, 5, 2], [0, 4, 3, 10]])


_FC = {f"block.{n}.{fc}": "lora" for n in range(3) for fc in ("fc1", "fc2")}
_DORA = dict.fromkeys(_FC, "dora")
_LLAMA = {f"model.layers.{n}.self_attn.{p}_proj": "lora" for n in range(2) for p in "qv"}
_EXPERTS = {"mlp.experts.gate_up_proj": "lora", "mlp.experts.down_proj": "lora"}

CASES: dict[str, Case] = {
    "plain": Case(Net, {"r": 2, "lora_alpha": 6, "target_modules": ["fc1", "fc2"]}, _FC, ids),
    "conv1d-of-transformers": Case(
        Gpt2Like,
        {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"c_attn": "lora", "c_proj": "lora"},
    ),
    "rslora": Case(
        Net,
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["fc1"]},
        {k: v for k, v in _FC.items() if "fc1" in k},
        ids,
    ),
    "patterns": Case(
        Net,
        {
            "r": 2,
            "lora_alpha": 6,
            "target_modules": ["fc1", "fc2"],
            "rank_pattern": {"fc2": 3, "^block.1.fc1": 4},
            "alpha_pattern": {"2.fc1": 5, "block.*.fc2": 7},
        },
        _FC,
        ids,
    ),
    "expression": Case(
        Net,
        {"r": 2, "target_modules": r"block\.[02]\.fc.*", "lora_dropout": 0.25},
        {k: v for k, v in _FC.items() if ".1." not in k},
        ids,
    ),
    "dora": Case(Net, {"r": 2, "use_dora": True, "target_modules": ["fc1", "fc2"]}, _DORA, ids),
    "embedding": Case(
        Net,
        {"r": 2, "target_modules": ["embed_tokens", "fc1"]},
        {"embed_tokens": "lora", **{k: v for k, v in _FC.items() if "fc1" in k}},
        ids,
    ),
    "embedding-dora": Case(
        Net, {"r": 2, "use_dora": True, "target_modules": ["embed_tokens"]}, {"embed_tokens": "dora"}, ids
    ),
    "convolutions": Case(
        Convs,
        {"r": 2, "target_modules": ["one", "two", "three"]},
        dict.fromkeys(("one", "two", "three"), "lora"),
        lambda: torch.randn(2, 4, 5),
    ),
    "convolutions-dora": Case(
        Convs,
        {"r": 2, "use_dora": True, "target_modules": ["one", "two", "three"]},
        dict.fromkeys(("one", "two", "three"), "dora"),
        lambda: torch.randn(2, 4, 5),
    ),
    "convolutions-bias": Case(
        Convs,
        {"r": 2, "lora_bias": True, "target_modules": ["one", "two"]},
        {"one": "lora", "two": "lora"},
        lambda: torch.randn(2, 4, 5),
    ),
    "lora-bias": Case(
        Net,
        {"r": 2, "lora_bias": True, "target_modules": ["fc1"]},
        {k: v for k, v in _FC.items() if "fc1" in k},
        ids,
    ),
    "modules-to-save": Case(
        Net,
        {"r": 2, "target_modules": ["fc1"], "modules_to_save": ["head", "norm"]},
        {
            **{k: v for k, v in _FC.items() if "fc1" in k},
            "head.weight": "full",
            "head.bias": "full",
            "norm.weight": "full",
            "norm.bias": "full",
        },
        ids,
    ),
    "bias-of-lora": Case(
        Net,
        {"r": 2, "target_modules": ["fc1", "fc2"], "bias": "lora_only"},
        {**_FC, **{f"block.{n}.fc1.bias": "full" for n in range(3)}},
        ids,
    ),
    "bias-all": Case(
        Net,
        {"r": 2, "target_modules": ["fc2"], "bias": "all"},
        {
            **{k: v for k, v in _FC.items() if "fc2" in k},
            **{f"block.{n}.fc1.bias": "full" for n in range(3)},
            "norm.bias": "full",
            "head.bias": "full",
        },
        ids,
    ),
    "attention": Case(
        Attention,
        {"r": 2, "target_modules": ["attn", "fc"], "rank_pattern": {"attn": 3}},
        {"attn.in_proj_weight": "lora", "attn.out_proj": "lora", "fc": "lora"},
    ),
    "attention-bias": Case(
        Attention,
        {"r": 2, "target_modules": ["attn"], "bias": "lora_only"},
        {"attn.in_proj_weight": "lora", "attn.out_proj": "lora", "attn.out_proj.bias": "full"},
    ),
    "attention-in-proj-only": Case(
        Attention,
        {"r": 2, "target_modules": ["fc"], "target_parameters": ["attn.in_proj_weight"]},
        {"attn.in_proj_weight": "lora", "fc": "lora"},
    ),
    "experts": Case(
        Mixture,
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["fc"],
            "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        },
        {**_EXPERTS, "fc": "lora"},
    ),
    "experts-and-router": Case(
        Mixture,
        {
            "r": 2,
            "target_modules": [],
            "target_parameters": ["gate.weight", "gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"down_proj": 3},
        },
        {**_EXPERTS, "mlp.gate.weight": "lora"},
    ),
    "token-rows-untied": Case(
        lambda: Tied(False),
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "trainable_token_indices": [3, 16, 1]},
        {**_LLAMA, "model.embed_tokens": "token_rows"},
        ids,
    ),
    "token-rows-tied": Case(
        lambda: Tied(True),
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "trainable_token_indices": {"embed_tokens": [3, 1]}},
        {**_LLAMA, "model.embed_tokens": "token_rows"},
        ids,
    ),
    "token-rows-of-head": Case(
        lambda: Tied(False),
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "trainable_token_indices": {"lm_head": [3, 1]}},
        {**_LLAMA, "lm_head": "token_rows"},
        ids,
    ),
    "table-saved-along": Case(
        lambda: Tied(False),
        {"r": 2, "target_modules": ["q_proj", "v_proj", "embed_tokens"], "task_type": "CAUSAL_LM"},
        {**_LLAMA, "model.embed_tokens": "lora", "model.embed_tokens.weight": "full"},
        ids,
    ),
}

TRANSPOSED = Case(
    lambda: Mixture(is_transposed=True),
    {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": [],
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
    },
    _EXPERTS,
)
