"""diffusers' three forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.errors import AdapterFileError
from lorakit.io.formats import convert, read_any
from lorakit.methods import LoRA

ATTN = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
DOWN, UP = torch.randn(4, 6), torch.randn(6, 4)


@pytest.mark.parametrize(
    ("key", "path", "form"),
    [
        (f"{ATTN}.to_q.lora_%s.weight", f"{ATTN}.to_q", "diffusers"),
        (f"{ATTN}.to_out.0.lora.%s.weight", f"{ATTN}.to_out.0", "diffusers-old"),
        (f"{Q_PROJ}.lora_linear_layer.%s.weight", Q_PROJ, "diffusers-old"),
        (f"{ATTN}.processor.to_q_lora.%s.weight", f"{ATTN}.to_q", "diffusers-processors"),
        (f"{ATTN}.processor.to_out_lora.%s.weight", f"{ATTN}.to_out.0", "diffusers-processors"),
        (f"{Q_PROJ[:-7]}.to_q_lora.%s.weight", Q_PROJ, "diffusers-old"),
        ("mid_block.attentions.0.processor.to_v_lora.%s.weight", "unet.mid_block.attentions.0.to_v",
         "diffusers-processors"),
        ("transformer_blocks.0.attn.to_k.lora_%s.weight", "transformer.transformer_blocks.0.attn.to_k", "diffusers"),
    ],
)  # fmt: skip
def test_keys(tmp_path: Path, key: str, path: str, form: str) -> None:
    words = ("A", "B") if "lora_%s" in key else ("down", "up")
    save_file({key % words[0]: DOWN, key % words[1]: UP}, tmp_path / "a.safetensors")
    state, found = read_any(tmp_path / "a.safetensors")
    if found == "diffusers":
        assert form == "diffusers"
    assert found == form or key.startswith("transformer")
    assert dict(state.spec.methods) == {path: LoRA(r=4, alpha=4.0)}
    assert torch.equal(state.tensors[path]["lora_A"], DOWN)
    assert torch.equal(state.tensors[path]["lora_B"], UP)


@pytest.mark.parametrize("form", ["diffusers-old", "diffusers-processors"])
def test_a_scale_is_multiplied_in_where_there_is_no_alpha(tmp_path: Path, form: str) -> None:
    tensors = {
        f"{ATTN}.to_q.lora_A.weight": DOWN,
        f"{ATTN}.to_q.lora_B.weight": UP,
        f"{ATTN}.to_q.alpha": torch.tensor(8.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    result = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", form)
    assert "multiplied into the factors" in result.losses[0]
    assert "rounded" not in result.losses[0]
    state, found = read_any(tmp_path / "b.safetensors")
    assert found == form
    assert torch.equal(state.tensors[f"{ATTN}.to_q"]["lora_B"], 2 * UP)


def test_metadata_says_alpha(tmp_path: Path) -> None:
    said = {"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": {"to_k": 8}, "unet.use_rslora": False}
    names = ("to_q", "to_k")
    tensors = {f"{ATTN}.{n}.lora_{w}.weight": t.clone() for n in names for w, t in (("A", DOWN), ("B", UP))}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    state, _ = read_any(tmp_path / "a.safetensors")
    assert [m.alpha for m in state.spec.methods.values()] == [8.0, 2.0]  # type: ignore[attr-defined]
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    again, _ = read_any(tmp_path / "b.safetensors")
    assert dict(again.spec.methods) == dict(state.spec.methods)
    assert load_file(tmp_path / "b.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize(
    "text", ["[", "[1]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": 3}', "[" * 100_000]
)
def test_metadata_that_is_not_as_diffusers_writes_it(tmp_path: Path, text: str) -> None:
    tensors = {f"{ATTN}.to_q.lora_A.weight": DOWN, f"{ATTN}.to_q.lora_B.weight": UP}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(AdapterFileError, match="lora_adapter_metadata"):
        read_any(tmp_path / "a.safetensors")


def test_a_stray_key_is_an_error(tmp_path: Path) -> None:
    tensors = {
        f"{ATTN}.to_q.lora_A.weight": DOWN,
        f"{ATTN}.to_q.lora_B.weight": UP,
        f"{ATTN}.to_q.lora_C.weight": UP.clone(),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"1 unexpected.*lora_C"):
        read_any(tmp_path / "a.safetensors")
