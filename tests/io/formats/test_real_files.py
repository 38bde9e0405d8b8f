"""The published files: numbered tensors of cloneofsimo's, and the LoRA paper's own result."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lorakit.errors import AdapterFileError
from lorakit.io.formats import Hints, convert, read_any
from lorakit.io.formats.architectures import sd15
from lorakit.io.safetensors_file import load_tensors
from lorakit.methods import LoRA, TokenRows

WEIGHTS = (
    Path(os.environ.get("LORAKIT_DATA", Path(__file__).parents[3].parent / "shared" / "data")) / "weights"
)
DISNEY, ANALOG = (
    WEIGHTS / "lora_sd15" / f"{name}.safetensors" for name in ("lora_disney", "analog_svd_rank4")
)
MNLI = WEIGHTS / "lora_roberta_mnli" / "roberta_base_lora_mnli.bin"
pytestmark = pytest.mark.skipif(
    not DISNEY.is_file(), reason="the published files are not here (LORAKIT_DATA)"
)
_TABLE = "text_encoder.text_model.embeddings.token_embedding"


def same_file(a: Path, b: Path) -> None:
    one, other = load_tensors(a)[0], load_tensors(b)[0]
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype
        assert torch.equal(tensor, other[key]), key


@pytest.mark.parametrize("file", [DISNEY, ANALOG])
def test_numbers_mean_layers_of_the_right_size(file: Path) -> None:
    state, found = read_any(file)
    assert found == "cloneofsimo"
    sizes = sd15().sizes
    loras = {path: m for path, m in state.spec.methods.items() if isinstance(m, LoRA)}
    assert len(loras) == 192
    for path, lora in loras.items():
        shape = state.spec.shapes[path]
        assert sizes[path] == (shape.out, shape.in_)
        assert lora.scale == 1


def test_learnt_tokens_are_rows() -> None:
    state, _ = read_any(DISNEY)
    assert state.spec.methods[_TABLE] == TokenRows((49408, 49409))
    assert state.spec.info["tokens"] == {"<s1>": 49408, "<s2>": 49409}
    raw = load_tensors(DISNEY)[0]
    assert torch.equal(state.tensors[_TABLE]["rows"], torch.stack([raw["<s1>"], raw["<s2>"]]))


@pytest.mark.parametrize("file", [DISNEY, ANALOG])
def test_round_trip_to_the_bit(file: Path, tmp_path: Path) -> None:
    assert convert(file, tmp_path / "a.safetensors", "cloneofsimo").losses == []
    same_file(file, tmp_path / "a.safetensors")


@pytest.mark.parametrize("way", ["kohya", "diffusers", "diffusers-old", "lycoris", "peft", "native"])
def test_through_another_format_and_back(way: str, tmp_path: Path) -> None:
    between = tmp_path / ("between" if way in ("peft", "native") else "between.safetensors")
    convert(ANALOG, between, way)
    convert(between, tmp_path / "back.safetensors", "cloneofsimo")
    same_file(ANALOG, tmp_path / "back.safetensors")


def test_attention_processors_hold_attention_alone(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="no projection of an attention"):
        convert(ANALOG, tmp_path / "a.safetensors", "diffusers-processors")
    assert list(tmp_path.iterdir()) == []


def test_learnt_tokens_are_refused_where_they_would_be_lost(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="token_embedding"):
        convert(DISNEY, tmp_path / "a.safetensors", "kohya")
    result = convert(DISNEY, tmp_path / "a.safetensors", "kohya", only="unet", under="unet")
    assert result.losses == ["49 targets outside 'unet', as asked"]


def test_the_papers_result(tmp_path: Path) -> None:
    hints = Hints(alpha=16.0)
    result = convert(MNLI, tmp_path / "mnli", "peft", hints=hints, allow_pickle=True)
    assert (result.source, result.parameters, result.targets) == ("loralib", 887_811, 28)
    convert(tmp_path / "mnli", tmp_path / "back.bin", "loralib")
    before, after = (
        torch.load(p, weights_only=True, map_location="cpu") for p in (MNLI, tmp_path / "back.bin")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[key]) for key, t in before.items())


def test_alpha_has_to_be_said() -> None:
    with pytest.raises(AdapterFileError, match=r"--alpha"):
        read_any(MNLI, allow_pickle=True)
    with pytest.raises(AdapterFileError, match="pickle"):
        read_any(MNLI)
