"""What is measured: small models with many layers, single wide layers, and the same adapter on both sides."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, WIDTH, INNER, HEADS, VOCABULARY = 24, 64, 128, 4, 128
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = [*ATTENTION, *MLP]
SITES = LAYERS * len(LINEARS)


# ---- 168 sites ------------------------------------------------------------------------------------------------------
def transformers_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A transformers Llama with 24 layers of 7 linears, so narrow that only the cost per layer is left."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        use_cache=False,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


class Block(nn.Module):
    """One layer: attention and a gated MLP, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in ATTENTION})
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(WIDTH, INNER, bias=False),
                "up_proj": nn.Linear(WIDTH, INNER, bias=False),
                "down_proj": nn.Linear(INNER, WIDTH, bias=False),
            }
        )
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        attn, mlp = self.self_attn, self.mlp
        h = self.norms[0](x)
        q, k, v = (
            attn[name](h).unflatten(-1, (HEADS, -1)).transpose(-2, -3)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        x = x + attn["o_proj"](
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)
        )
        h = self.norms[1](x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](h)) * mlp["up_proj"](h))


class PlainLlama(nn.Module):
    """The same 168 sites in plain torch, for what costs without transformers' own classes around."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def plain_llama() -> nn.Module:
    """A `PlainLlama`, in eval mode."""
    torch.manual_seed(0)
    return PlainLlama().eval()


# ---- one layer ------------------------------------------------------------------------------------------------------
class Holder(nn.Module):
    """Layers by name, with nothing around them."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def linear_holder(
    width: int, names: Sequence[str] = ("q",), dtype: torch.dtype = torch.float32, bias: bool = False
) -> Holder:
    """Square linear layers."""
    torch.manual_seed(0)
    return Holder(**{name: nn.Linear(width, width, bias=bias, dtype=dtype) for name in names})


# ---- both sides -----------------------------------------------------------------------------------------------------
def with_peft(model: nn.Module, targets: Sequence[str], **settings: Any) -> Any:
    """A deep copy of the model, wrapped by PEFT with a LoRA whose factors are both random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(target_modules=list(targets), **{"init_lora_weights": False, **settings})
    return get_peft_model(copy.deepcopy(model), config)


def with_lorakit(
    model: nn.Module, directory: Path, *, name: str = "default", trainable: bool = False
) -> nn.Module:
    """A deep copy of the model with the adapter in a directory attached."""
    import lorakit as lk

    own = copy.deepcopy(model)
    lk.load(own, directory, name=name, trainable=trainable)
    return own


def both(
    model: nn.Module, targets: Sequence[str], *, training: bool = False, **settings: Any
) -> tuple[nn.Module, Any]:
    """The model under lorakit and under PEFT, with one adapter in common: PEFT writes it, lorakit reads it."""
    theirs = with_peft(model, targets, **settings).train(training)
    with folder() as directory:
        theirs.save_pretrained(directory)
        ours = with_lorakit(model, directory, trainable=training).train(training)
    return ours, theirs


@contextmanager
def folder() -> Iterator[Path]:
    """A directory that is gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="lorakit-bench-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def check_equal(ours: Tensor, theirs: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Stop unless both sides computed the same: a fast wrong answer is not a result.

    Args:
        ours: An output of lorakit.
        theirs: The same of PEFT.
        what: For the message.
        tolerance: Largest difference, relative to the largest entry.
    """
    difference = float(
        (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-12)
    )
    if not difference <= tolerance:
        raise SystemExit(
            f"{what}: lorakit and PEFT differ by {difference:.2e} (relative); nothing was measured."
        )


def check_changes(adapted: Tensor, base: Tensor, what: str) -> None:
    """Stop unless the adapter does something: two idle sides would agree as well."""
    if torch.equal(adapted, base):
        raise SystemExit(f"{what}: the adapter changes nothing; nothing was measured.")
