"""What is combined from PEFT's files is read by PEFT again, and computes the same there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.adapters import combine, resize
from lorakit.io import write

peft = pytest.importorskip("peft")
tf = pytest.importorskip("transformers")


def gpt2() -> Any:
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=19, n_positions=16)
    ).eval()


def saved(folder: Path, seed: int, **settings: Any) -> lk.AdapterState:
    """An adapter that PEFT wrote for GPT-2, whose layers keep their weights transposed."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(init_lora_weights=False, fan_in_fan_out=True, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(gpt2(), config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return lk.read(folder)


def test_through_files(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", 1, r=3, target_modules=["c_attn", "c_fc"], use_rslora=True)
    b = saved(tmp_path / "b", 2, r=2, target_modules=["c_attn"])
    ids = torch.arange(5).view(1, 5)
    model = gpt2()
    lk.attach(model, a, name="a")
    lk.attach(model, b, name="b")
    with lk.use(model, {"a": 0.5, "b": -2.0}):
        wanted = model(ids).logits
    for made in (combine([a, b], [0.5, -2.0]).state, resize(combine([a, b], [0.5, -2.0]).state, 5).state):
        write(made, tmp_path / "made")
        theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "made").eval()
        torch.testing.assert_close(theirs(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        assert theirs.peft_config["default"].task_type == ("CAUSAL_LM")


def test_a_head_that_is_dropped_or_averaged(tmp_path: Path) -> None:
    a, b = (
        saved(tmp_path / str(n), n, r=2, target_modules=["c_attn"], modules_to_save=["ln_f"]) for n in (1, 2)
    )
    dropped = combine([a, b], copies="drop").state
    write(dropped, tmp_path / "dropped")
    assert set(lk.read(tmp_path / "dropped").tensors) == {"transformer.h.0.attn.c_attn"}
    averaged = combine([a, b], copies="average").state
    write(averaged, tmp_path / "averaged")
    again = lk.read(tmp_path / "averaged")
    path = "transformer.ln_f.weight"
    mean = (a.tensors[path]["value"] + b.tensors[path]["value"]) / 2
    torch.testing.assert_close(again.tensors[path]["value"], mean)
