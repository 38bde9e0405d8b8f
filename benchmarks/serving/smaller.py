"""A smaller base than SmolLM2, of random numbers: where products are short, an engine's own work shows."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.serving.adapters import base_folder

SMALLER = "small"


def make_base(work: Path) -> Path:
    """The folder of a Llama of 25 million parameters with SmolLM2's tokenizer; made once and kept."""
    folder = work / SMALLER
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = base_folder("smollm2")
    config = AutoConfig.from_pretrained(source)
    config.update(
        {
            "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "num_attention_heads": 5,
            "num_key_value_heads": 1, "head_dim": 64,
        }
    )  # fmt: skip
    for kept in ("layer_types", "quantization_config"):
        if hasattr(config, kept):
            delattr(config, kept)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for file in source.iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt", "chat_template.jinja"):
            shutil.copy(file, folder)
    return folder
