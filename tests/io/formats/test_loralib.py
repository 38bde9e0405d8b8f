"""loralib's state dicts: MergedLinear as slices, embeddings, whole parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit.errors import AdapterFileError
from lorakit.io.formats import Hints, read_any, write_as
from lorakit.methods import FullFineTuning, LoRA

FUSED = "transformer.h.0.attn.c_attn"
SLOTS = Hints(alpha=32.0, slots=(True, False, True))


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, folder / "in.pt")
    return folder / "in.pt"


def test_merged_linear_is_slices(tmp_path: Path) -> None:
    A, B = torch.randn(8, 6), torch.randn(12, 4)
    file = saved(tmp_path, {f"{FUSED}.lora_A": A, f"{FUSED}.lora_B": B})
    state, _ = read_any(file, hints=SLOTS, allow_pickle=True)
    assert list(state.spec.methods) == [f"{FUSED}[q]", f"{FUSED}[v]"]
    # What loralib's zero_pad and grouped convolution make of it: each part from its own rows and columns.
    for n, path in enumerate(state.spec.methods):
        assert state.spec.methods[path] == LoRA(r=4, alpha=32.0)
        got = state.tensors[path]["lora_B"] @ state.tensors[path]["lora_A"]
        assert torch.equal(got, B[6 * n : 6 * n + 6] @ A[4 * n : 4 * n + 4])
    losses = write_as(state, tmp_path / "out.pt", "loralib")
    again = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(again[f"{FUSED}.lora_A"], A)
    assert torch.equal(again[f"{FUSED}.lora_B"], B)
    assert any("parts [0, 2]" in loss for loss in losses)


def test_parts_of_a_layer_of_another_name_are_rows(tmp_path: Path) -> None:
    file = saved(tmp_path, {"x.qkv.lora_A": torch.randn(4, 6), "x.qkv.lora_B": torch.randn(8, 2)})
    state, _ = read_any(file, hints=Hints(alpha=1.0, slots=(False, True, True)), allow_pickle=True)
    assert list(state.spec.methods) == ["x.qkv[4:8]", "x.qkv[8:12]"]
    write_as(state, tmp_path / "out.pt", "loralib")
    assert torch.load(tmp_path / "out.pt", weights_only=True).keys() == {"x.qkv.lora_A", "x.qkv.lora_B"}


@pytest.mark.parametrize("slots", [(), (True, True, True), (True,)])
def test_parts_have_to_be_said_and_to_fit(tmp_path: Path, slots: tuple[bool, ...]) -> None:
    file = saved(tmp_path, {f"{FUSED}.lora_A": torch.randn(8, 6), f"{FUSED}.lora_B": torch.randn(12, 4)})
    with pytest.raises(AdapterFileError, match=r"factors of 2 of its parts.*--slots"):
        read_any(file, hints=Hints(alpha=1.0, slots=slots), allow_pickle=True)


def test_embeddings_and_whole_parameters(tmp_path: Path) -> None:
    tensors = {
        "m.wte.lora_A": torch.randn(2, 50), "m.wte.lora_B": torch.randn(6, 2), "head.weight": torch.randn(3, 6),
        "norm.bias": torch.randn(6),
    }  # fmt: skip
    state, _ = read_any(saved(tmp_path, tensors), hints=Hints(alpha=1.0), allow_pickle=True)
    assert state.spec.shapes["m.wte"].kind == "embedding"
    assert state.spec.methods["norm.bias"] == FullFineTuning()
    write_as(state, tmp_path / "out.pt", "loralib")
    again = torch.load(tmp_path / "out.pt", weights_only=True)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(t, again[key]) for key, t in tensors.items())


def test_a_pickle_of_more_than_tensors(tmp_path: Path) -> None:
    torch.save({"x.lora_A": torch.ones(1, 1), "n": Path("x")}, tmp_path / "in.pt")
    with pytest.raises(AdapterFileError, match="holds more than tensors"):
        read_any(tmp_path / "in.pt", allow_pickle=True)
