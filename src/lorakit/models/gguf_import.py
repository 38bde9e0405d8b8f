"""Convert a GGUF file of the Llama family into a plain transformers folder, once.

transformers can read a GGUF file itself, but dequantises it on every load (half a minute for 135M parameters), marks
the model as quantised so that it cannot be saved, and gives a tokenizer without the digit splitting that SmolLM was
trained with. Here the blocks are dequantised once to float32, which holds each of their values exactly (bfloat16
would keep about a fifth of them, float16 three fifths), and the tokenizer is built from what the file records.

The layout of GGUF is told by the `gguf` package; the order of rows in the q and k projections is that of
`convert_hf_to_gguf.py` in ggml-org/llama.cpp, undone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.errors import ModelError
from lorakit.io.safetensors_file import pieces_of

if TYPE_CHECKING:
    import numpy as np

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",  # absent where the head is the embedding table
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROW_NUMBERS = 2**20
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL: what a chat template writes, never cut by the tokenizer


def convert_gguf(path: Path, folder: Path) -> None:
    """Write config, float32 weights, tokenizer and generation config of the GGUF file `path` into `folder`.

    Raises:
        ModelError: The file is no GGUF file, or not of a kind that this converter knows.
    """
    from safetensors.torch import save_file

    source = GgufModel(path)
    source.write_settings(folder)
    save_file(dict(source), folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors writes a file that only its owner can read; a shared cache needs the usual mode.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


class GgufModel(Mapping[str, torch.Tensor]):
    """The weights of a GGUF file under transformers' names, float32, dequantised when they are asked for.

    Attributes:
        path: The file.
        config: What transformers' ``config.json`` says of it.

    Raises:
        ModelError: The file is no GGUF file, or not of a kind that this converter knows.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            reader = GGUFReader(path)
        except (ValueError, OSError, IndexError) as error:
            raise ModelError(f"{path.name} cannot be read as a GGUF file: {error}") from error
        fields = {name: field.contents() for name, field in reader.fields.items()}
        architecture = fields.get("general.architecture")
        if architecture != "llama":
            raise ModelError(
                f"{path.name} holds a model of the architecture {architecture!r}; only 'llama' can be converted here. "
                "Convert it with its own tools and name the resulting folder."
            )
        self._heads = int(fields["llama.attention.head_count"])
        self._kv_heads = int(fields.get("llama.attention.head_count_kv", self._heads))
        self._entries = _entries(reader.tensors, fields, path.name)
        self.config = _config(fields, tied="lm_head.weight" not in self._entries)
        self._tokenizer_files = _tokenizer_files(fields, path.name)

    def __getitem__(self, name: str) -> torch.Tensor:
        from gguf.quants import dequantize

        entry = self._entries[name]
        out = torch.empty(self.shape(name), dtype=torch.float32)
        rows = out.numpy().reshape(-1, out.shape[-1])
        data = entry.data.reshape(len(rows), -1)
        heads = {"attn_q.weight": self._heads, "attn_k.weight": self._kv_heads}.get(
            ".".join(entry.name.split(".")[2:]), 0
        )
        # Some rows at a time, so that nothing of the whole size is made but the result; of q and k, whole heads.
        each = len(rows) // heads if heads else max(1, _ROW_NUMBERS // out.shape[-1])
        for start in range(0, len(rows), each):
            found = dequantize(data[start : start + each], entry.tensor_type)
            rows[start : start + each] = _head_in_transformers_order(found) if heads else found
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The size of a tensor, without dequantising it."""
        return tuple(int(size) for size in reversed(self._entries[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        """Float32, which every tensor is dequantised to."""
        return torch.float32

    def file(self, name: str) -> None:
        """None: the tensor is in no safetensors file."""

    def pieces(self, name: str) -> Iterator[Any]:
        """The bytes of a tensor, dequantised."""
        return pieces_of(self[name])

    def write_settings(self, folder: Path) -> None:
        """Write config, generation config and tokenizer into a folder, as transformers reads them."""
        _write_json(folder / "config.json", self.config)
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(
            folder / "generation_config.json",
            {key: self.config[key] for key in special if key in self.config},
        )
        for name, content in self._tokenizer_files.items():
            _write_json(folder / name, content)


def _entries(entries: list[Any], fields: Mapping[str, Any], file: str) -> dict[str, Any]:
    """What the file holds under transformers' names; every expected tensor and no other."""
    names = {**_OUTER}
    for layer in range(int(fields["llama.block_count"])):
        for theirs, ours in _BLOCK.items():
            names[f"blk.{layer}.{theirs}.weight"] = f"model.layers.{layer}.{ours}.weight"

    found = {entry.name for entry in entries}
    unknown, missing = found - names.keys(), names.keys() - found - {"output.weight"}
    if unknown or missing:
        raise ModelError(
            f"{file} does not hold the tensors of a plain Llama model: "
            f"unknown {sorted(unknown)[:5]}, missing {sorted(missing)[:5]}"
        )
    return {names[entry.name]: entry for entry in entries}


def _head_in_transformers_order(rows: np.ndarray) -> np.ndarray:
    """Undo the interleaving of rotary halves in one head: rows (pair, half) become (half, pair)."""
    pairs = rows.shape[0] // 2
    return rows.reshape(pairs, 2, -1).swapaxes(0, 1).reshape(rows.shape)


def _config(fields: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    heads = int(fields["llama.attention.head_count"])
    hidden = int(fields["llama.embedding_length"])
    theta = _decimal(fields.get("llama.rope.freq_base", 10_000.0))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),
        "head_dim": int(fields.get("llama.rope.dimension_count", hidden // heads)),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "rms_norm_eps": _decimal(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,  # the same for readers older than transformers 5, which would assume 10,000
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{role}_token_id"] = int(token)
    return config


def _decimal(value: float) -> float:
    """A float32 as the shortest decimal that it stands for: 9.999999747378752e-06 was written as 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))


def _tokenizer_files(fields: Mapping[str, Any], file: str) -> dict[str, dict[str, Any]]:
    kind = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ModelError(
            f"{file} has a tokenizer of the kind {kind}; only ('gpt2', 'smollm') can be converted here. "
            "A wrong guess would cut text into other tokens than the model was trained on."
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, token_type in enumerate(fields["tokenizer.ggml.token_type"])
        if token_type == _CONTROL_TOKEN
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        # "smollm" means: each digit by itself, before GPT-2's rule cuts the rest.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": list(fields["tokenizer.ggml.merges"]),
        },
    }
    settings: dict[str, Any] = {
        # Not GPT2Tokenizer: that class replaces the digit splitting by its own rule.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(fields["llama.context_length"]),
        "clean_up_tokenization_spaces": False,
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (index := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            settings[f"{role}_token"] = tokens[int(index)]
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
