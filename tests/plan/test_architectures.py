"""From a name to a model on the meta device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.errors import ConfigError, ModelError
from lorakit.plan import architecture, architectures, count
from lorakit.targets.counting import base_numel

TOTALS = {  # of the published checkpoints
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-3b": 3_085_938_688,
    "smollm2-135m": 134_515_008,
    "minilm": 22_713_216,
    "mt0-large": 1_229_581_312,
    "t5-base": 222_903_552,
    "t0-3b": 2_849_757_184,
    "roberta-base": 124_697_433,
    "vit-b-16": 86_567_656,
    "resnet-18": 11_689_512,
    "resnet-101": 44_549_160,
    "resnet-18-cifar10": 11_173_962,
    "resnet-101-cifar100": 42_697_380,
    "sd-1.5-unet": 859_520_964,
}


@pytest.mark.parametrize("name", TOTALS)
def test_size_of_a_shipped_config(name: str) -> None:
    model = architecture(name).model
    assert base_numel(model) == TOTALS[name]
    assert all(p.is_meta for p in model.parameters())


def test_every_shipped_config_says_what_it_is() -> None:
    shipped = architectures()
    assert set(TOTALS) < set(shipped)
    assert all(about for about in shipped.values())


def test_a_folder_and_a_file_mean_the_same(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = {base_numel(architecture(where).model) for where in (tmp_path, str(tmp_path / "config.json"))}
    assert len(sizes) == 1


def test_a_fresh_head() -> None:
    base = architecture("roberta-base", task="sequence-classification", num_labels=3).model
    head = sum(p.numel() for p in base.classifier.parameters())  # type: ignore[union-attr]
    assert head == 592_899


def test_an_untied_head_is_counted() -> None:
    found = architecture("mt0-large")
    head, table = found.model.get_output_embeddings(), found.model.get_input_embeddings()  # type: ignore[operator]
    assert head.weight is not table.weight
    assert "not tied" in found.notes[0]
    assert architecture("t5-base").notes == ()


def test_a_table_counts_and_does_not_run() -> None:
    base = architecture("resnet-18")
    assert not base.runs
    assert count(base.model, lk.LoRA(r=4), ["fc"]).trainable == 4 * (512 + 1000)


@pytest.mark.parametrize(
    ("name", "says"), [("llama-2-7", "llama-2-7b"), ("no-such-thing", "config.json"), ("", "config.json")]
)
def test_an_unknown_name(name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=says):
        architecture(name)


def test_bad_configs(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, says in (
        ("{", "not JSON"),
        ("[]", "no model_type"),
        ('{"model_type": "nothing"}', "cannot read"),
    ):
        path.write_text(text)
        with pytest.raises(ModelError, match=says):
            architecture(path)
    path.write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="task"):
        architecture(path)
    path.write_text('{"layers": {"a": {"lstm": [1]}}}')
    with pytest.raises(ModelError, match="'a'"):
        architecture(path)
    with pytest.raises(ConfigError, match="task"):
        architecture("gpt2", task="chat")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="head"):
        architecture("gpt2", num_labels=3)


def test_nothing_is_allocated() -> None:
    before = torch.get_rng_state()
    architecture("gpt2")
    assert torch.equal(before, torch.get_rng_state())
