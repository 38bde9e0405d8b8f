"""What is saved at the end: the compacted adapter, and its card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import lorakit as lk
from lorakit.models import load_model
from lorakit.train import Recipe, train
from lorakit.train.model_card import public_name

MakeRecipe = Callable[..., Recipe]


def test_adalora_is_saved_without_the_triplets_that_it_pruned(recipe: MakeRecipe) -> None:
    adapter = {"method": "adalora", "init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 1}
    result = train(recipe(max_steps=14, save_every=14, lr=3e-2, sections={"adapter": adapter}))
    saved, kept = lk.read(result.adapter), lk.read(result.folder / "checkpoint-14")
    assert saved.numel < 0.6 * kept.numel
    for group in kept.tensors.values():
        assert group["lora_E"].shape[0] == 6
    sites = len(saved.spec.methods)
    assert sum(group["lora_E"].numel() for group in saved.tensors.values()) <= 2 * sites
    for path, group in saved.tensors.items():
        assert (group["lora_E"] != 0).all() or group["lora_E"].shape[0] == 0, path
    # Nothing that it does was left out.
    ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    model = load_model(recipe().model.name)
    lk.load(model, result.adapter)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, result.model(input_ids=ids).logits, atol=1e-5)


def test_the_card_tells_what_the_adapter_is_and_no_folder_of_this_machine(
    recipe: MakeRecipe, tmp_path: Path
) -> None:
    result = train(recipe(max_steps=2))
    text = (result.adapter / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft"
    assert front["pipeline_tag"] == "text-generation"
    assert front["tags"] == ["lora", "lorakit"]
    assert "lora (r=4, alpha=8)" in text
    assert "24" in text
    assert str(tmp_path) not in text
    assert str(Path(recipe().model.name).parent) not in text
    assert lk.read(result.adapter).numel > 0


def test_a_card_that_a_person_wrote_is_kept(recipe: MakeRecipe) -> None:
    result = train(recipe(max_steps=1))
    card = result.adapter / "README.md"
    first = card.read_text(encoding="utf-8")
    train(recipe(max_steps=2), overwrite=True)
    assert card.read_text(encoding="utf-8") != first
    card.write_text("# Mine\n", encoding="utf-8")
    train(recipe(max_steps=1), overwrite=True)
    assert card.read_text(encoding="utf-8") == "# Mine\n"


@pytest.mark.parametrize(
    ("name", "public"), [("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("a/b", "a/b")]
)
def test_a_base_is_called_by_its_public_name(name: str, public: str) -> None:
    assert public_name(name) == public
