"""From directory to file and back, and what becomes of methods that other programs do not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterFileError
from lorakit.io.formats import FORMATS, convert, read_any, write_as
from tests.io.formats.cases import same_bits


def adapted(method: Any) -> tuple[nn.Module, lk.AdapterState]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"unet": nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Conv2d(4, 6, 3)})})
    lk.attach(model, method, targets=["a", "b"], seed=0)
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model, lk.extract(model)


@pytest.mark.parametrize(
    "method",
    [
        lk.LoRA(r=2, alpha=3.0),
        lk.LoRA(r=2, scaling="rslora"),
        lk.LoRA(r=2, init="pissa"),
        lk.DoRA(lk.LoRA(r=2)),
        lk.LoHa(r=2),
        lk.LoKr(r=2),
        lk.AdaLoRA(init_r=3, target_r=2),
        lk.LoRAFA(r=2),
    ],
    ids=lambda method: type(method).__name__ + getattr(method, "scaling", "") + getattr(method, "init", ""),
)
@pytest.mark.parametrize("to", ["kohya", "native"])
def test_the_layers_compute_the_same_afterwards(tmp_path: Path, method: Any, to: str) -> None:
    model, state = adapted(method)
    layers: Any = model["unet"]  # type: ignore[index]
    x, image = torch.randn(2, 6), torch.randn(1, 4, 5, 5)
    want = layers["a"](x), layers["b"](image)
    out = tmp_path / ("out" if to == "native" else "out.safetensors")
    write_as(state, out, to)
    again, _ = read_any(out)
    lk.detach(model)
    lk.attach(model, again)
    torch.testing.assert_close((layers["a"](x), layers["b"](image)), want)


@pytest.mark.parametrize("to", ["kohya", "lycoris", "diffusers"])
def test_peft_and_back(tmp_path: Path, to: str) -> None:
    _, state = adapted(lk.DoRA(lk.LoRA(r=2, alpha=3.0)))
    write_as(state, tmp_path / "peft", "peft")
    assert convert(tmp_path / "peft", tmp_path / "a.safetensors", to).source == "peft"
    assert convert(tmp_path / "a.safetensors", tmp_path / "back", "peft").source == to
    same_bits(state, lk.read(tmp_path / "back"))


def test_what_peft_cannot_say_is_refused_and_native_takes_it(tmp_path: Path) -> None:
    _, state = adapted(lk.LoKr(r=2, scaling="lycoris"))
    with pytest.raises(AdapterFileError, match="--to native"):
        write_as(state, tmp_path / "a", "peft")
    assert not (tmp_path / "a").exists()
    write_as(state, tmp_path / "a", "native")
    assert read_any(tmp_path / "a")[1] == "native"


def test_parts(tmp_path: Path) -> None:
    _, state = adapted(lk.LoRA(r=2))
    write_as(state, tmp_path / "a.safetensors", "diffusers")
    with pytest.raises(AdapterFileError, match="no targets in 'text_encoder'; its paths start with unet"):
        convert(tmp_path / "a.safetensors", tmp_path / "b", "peft", only="text_encoder")
    convert(tmp_path / "a.safetensors", tmp_path / "b", "peft", only="unet")
    assert set(lk.read(tmp_path / "b").spec.methods) == {"a", "b"}
    with pytest.raises(AdapterFileError, match="--under unet"):
        convert(tmp_path / "b", tmp_path / "c.safetensors", "kohya")


def test_the_only_file_of_a_directory(tmp_path: Path) -> None:
    _, state = adapted(lk.LoRA(r=2))
    write_as(state, tmp_path / "lora" / "pytorch_lora_weights.safetensors", "diffusers")
    again, found = read_any(tmp_path / "lora")
    assert found == "diffusers"
    same_bits(state, again)


def test_a_format_that_is_said_is_believed(tmp_path: Path) -> None:
    save_file(
        {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(AdapterFileError, match=r"\(kohya\).*unexpected"):
        read_any(tmp_path / "a.safetensors", source_format="kohya")
    with pytest.raises(AdapterFileError, match="No format is called"):
        read_any(tmp_path / "a.safetensors", source_format="kohyaa")


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "gguf"])
def test_a_grouped_convolution_is_refused_everywhere(tmp_path: Path, to: str) -> None:
    model = nn.ModuleDict({"unet": nn.ModuleDict({"a": nn.Conv2d(4, 6, 3, groups=2)})})
    lk.attach(model, lk.LoRA(r=2), targets=["a"])
    ending = ".pt" if to == "loralib" else ".safetensors"
    with pytest.raises(AdapterFileError):
        write_as(lk.extract(model), tmp_path / f"a{ending}", to)
    assert list(tmp_path.iterdir()) == []
