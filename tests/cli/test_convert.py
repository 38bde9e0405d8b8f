"""``lorakit convert``."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import lorakit as lk
from tests.cli.conftest import Lorakit

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def _kohya(folder: Path) -> Path:
    save_file(
        {f"{STEM}.lora_down.weight": torch.randn(4, 320), f"{STEM}.lora_up.weight": torch.randn(320, 4),
         f"{STEM}.alpha": torch.tensor(2.0)},
        folder / "style.safetensors",
    )  # fmt: skip
    return folder / "style.safetensors"


def test_there_and_back(lorakit: Lorakit, tmp_path: Path) -> None:
    file = _kohya(tmp_path)
    outcome = lorakit("convert", file, tmp_path / "peft", "--to", "peft", "--only", "unet")
    assert outcome.code == 0, outcome
    assert "read as     kohya" in outcome.out
    state = lk.read(tmp_path / "peft")
    assert dict(state.spec.methods) == {PATH: lk.LoRA(r=4, alpha=2.0)}
    back = tmp_path / "back.safetensors"
    outcome = lorakit("convert", tmp_path / "peft", back, "--to", "kohya", "--under", "unet", "--json")
    assert json.loads(outcome.out) == {
        "source": "peft", "format": "kohya", "path": str(back), "targets": 1, "parameters": 2560,
        "bytes": back.stat().st_size, "losses": [], "not_finite": [],
    }  # fmt: skip
    before, after = load_file(file), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[key]) for key, t in before.items())


def test_names_and_mistakes(lorakit: Lorakit, tmp_path: Path) -> None:
    file = _kohya(tmp_path)
    (tmp_path / "names.txt").write_text(PATH)
    outcome = lorakit("convert", file, tmp_path / "a", "--to", "peft", "--names", tmp_path / "names.txt")
    assert outcome.code == 0, outcome
    assert list(lk.read(tmp_path / "a").spec.methods) == [PATH]
    outcome = lorakit("convert", file, tmp_path / "a", "--to", "peft")
    assert outcome.code == 2
    assert "--overwrite" in outcome.err
    outcome = lorakit("convert", file, tmp_path / "b", "--to", "peft", "--slots", "q,v")
    assert outcome.code == 2
    assert "1,0,1" in outcome.err
    assert not (tmp_path / "b").exists()
