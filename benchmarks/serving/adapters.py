"""Adapters in PEFT's format with random numbers, for a base of any size; made once and kept."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def base_folder(name: str) -> Path:
    """Where a base lies: a folder, or a built-in name."""
    from lorakit.models import resolve

    path = resolve(name).path
    assert path is not None
    return path


def make_adapters(folder: Path, base: str, ranks: Sequence[int], count: int, dtype: str = "float32") -> None:
    """Make ``a0000``, ``a0001``, ... in a folder, as far as they are not there, with the ranks in turn."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_folder(base))
    for i in range(count):
        place = folder / f"a{i:04d}"
        if not (place / "adapter_model.safetensors").exists():
            _make_adapter(place, config, ranks[i % len(ranks)], i, base, dtype)


def _make_adapter(place: Path, config: Any, r: int, seed: int, base: str, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    place.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(1000 + seed)
    hidden, heads, few = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    sizes = {"q_proj": (hidden, heads * width), "k_proj": (hidden, few * width), "v_proj": (hidden, few * width),
             "o_proj": (heads * width, hidden)}  # fmt: skip
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, (n, out) in sizes.items():
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{path}.lora_A.weight"] = (torch.rand(r, n, generator=draw) * 2 - 1) / math.sqrt(n)
            tensors[f"{path}.lora_B.weight"] = torch.randn(out, r, generator=draw) * 0.02
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r, "lora_dropout": 0.0, "bias": "none",
        "target_modules": list(sizes), "fan_in_fan_out": False, "base_model_name_or_path": base,
    }  # fmt: skip
    (place / "adapter_config.json").write_text(json.dumps(settings))
