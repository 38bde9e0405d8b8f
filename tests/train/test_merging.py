"""Merged models on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit as lk
from lorakit.errors import AdapterFileError, ConfigError, MergeError
from lorakit.train.merging import merge_to_folder
from tests.tiny_chat import save_tiny_chat, tiny_model

PROBE = torch.tensor([[5, 6, 7, 8, 9]])


def make(
    folder: Path, targets: object = "all-linear", seed: int = 1, **model: object
) -> tuple[Path, Path, torch.Tensor]:
    """A base, an adapter for it, and what both together compute."""
    base = save_tiny_chat(folder / "base", **model)
    loaded = tiny_model(**model)
    lk.attach(loaded, lk.LoRA(r=2), targets=targets, seed=seed)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lk.trainable(loaded).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        adapter = lk.save(loaded, folder / f"adapter{seed}")
        return base, adapter, loaded(input_ids=PROBE).logits


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=PROBE).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens"], ["lm_head"], ["q_proj", "lm_head"]])
def test_a_merged_folder_is_a_plain_model_that_computes_the_same(
    tmp_path: Path, tied: bool, targets: object
) -> None:
    base, adapter, expected = make(tmp_path, targets, tie_word_embeddings=tied)
    result = merge_to_folder(str(base), [adapter], tmp_path / "out")
    assert torch.allclose(logits(result.folder), expected, atol=1e-4)
    assert not torch.allclose(logits(base), expected, atol=1e-2)
    assert max(result.merged_difference, result.saved_difference) < 2e-4
    assert result.adapter_effect > 1e-2
    assert result.bytes > (result.folder / "model.safetensors").stat().st_size
    assert AutoTokenizer.from_pretrained(result.folder).chat_template
    assert not any("lora" in key for key in load_file(result.folder / "model.safetensors"))


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    base, one, _ = make(tmp_path, seed=1)
    _, two, _ = make(tmp_path, seed=2)
    model = tiny_model()
    lk.load(model, one, name="one")
    lk.load(model, two, name="two")
    with torch.no_grad(), lk.use(model, {"one": 0.7, "two": -0.3}):
        expected = model(input_ids=PROBE).logits
    result = merge_to_folder(str(base), [one, two], tmp_path / "out", weights=[0.7, -0.3])
    assert torch.allclose(logits(result.folder), expected, atol=1e-4)


def test_what_is_there_stays_unless_asked(tmp_path: Path) -> None:
    base, adapter, _ = make(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"exists and is not empty.*--overwrite"):
        merge_to_folder(str(base), [adapter], out)
    assert (out / "mine.txt").read_text(encoding="utf-8") == "mine"
    merge_to_folder(str(base), [adapter], out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter1", "base", "out"]


def test_an_adapter_with_nan_leaves_nothing(tmp_path: Path) -> None:
    base, adapter, _ = make(tmp_path)
    state = lk.read(adapter)
    broken = {
        path: {name: t * float("nan") for name, t in group.items()} for path, group in state.tensors.items()
    }
    lk.save(lk.AdapterState(state.spec, broken), adapter)
    with pytest.raises((MergeError, AdapterFileError), match="NaN"):
        merge_to_folder(str(base), [adapter], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter1", "base"]


def test_a_saved_model_that_is_not_the_same_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    base, adapter, _ = make(tmp_path)
    save = LlamaForCausalLM.save_pretrained

    def damage(model: LlamaForCausalLM, folder: Path) -> None:
        save(model, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] *= 1.5
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", damage)
    with pytest.raises(MergeError, match="differs from the unmerged one"):
        merge_to_folder(str(base), [adapter], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter1", "base"]


def test_numbers_must_agree(tmp_path: Path) -> None:
    base, adapter, _ = make(tmp_path)
    with pytest.raises(ConfigError, match="2 weights for 1 adapters"):
        merge_to_folder(str(base), [adapter], tmp_path / "out", weights=[1, 2])
    with pytest.raises(ConfigError, match="at least one adapter"):
        merge_to_folder(str(base), [], tmp_path / "out")


@pytest.mark.parametrize("where", ["the adapter's parent", "the adapter", "the base", "inside the base"])
def test_overwriting_never_destroys_what_is_merged(tmp_path: Path, where: str) -> None:
    base, adapter, _ = make(tmp_path / "home")
    out = {
        "the adapter's parent": tmp_path / "home",
        "the adapter": adapter,
        "the base": base,
        "inside the base": base / "merged",
    }[where]
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="Name another folder"):
        merge_to_folder(str(base), [adapter], out, overwrite=True)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_overwriting_replaces_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    base, adapter, expected = make(tmp_path)
    out = tmp_path / "merged"
    out.mkdir()
    (out / "old.txt").write_text("old")
    merge_to_folder(str(base), [adapter], out, overwrite=True)
    assert not (out / "old.txt").exists()
    torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-4)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
