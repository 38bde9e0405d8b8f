"""kohya's and LyCORIS's files: names, alphas, axes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.adapters.change import ShapeTarget
from lorakit.errors import AdapterFileError
from lorakit.io.formats import Hints, Names, convert, read_any, read_names, write_as
from lorakit.methods import DoRA, InputDoRA, LoHa, LoKr, LoRA

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
Q_PATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TE = "lora_te_text_model_encoder_layers_11_mlp_fc1"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
CONV_PATH = "unet.down_blocks.0.resnets.0.conv1"


def pair(out: int = 320, in_: int = 320, r: int = 4) -> dict[str, torch.Tensor]:
    return {"lora_down.weight": torch.randn(r, in_), "lora_up.weight": torch.randn(out, r)}


def saved(folder: Path, **layers: dict[str, torch.Tensor]) -> Path:
    save_file(
        {f"{stem}.{name}": t.contiguous() for stem, group in layers.items() for name, t in group.items()},
        folder / "in.safetensors",
    )
    return folder / "in.safetensors"


def test_alpha_and_its_absence(tmp_path: Path) -> None:
    file = saved(tmp_path, **{Q: {**pair(), "alpha": torch.tensor(1.0)}, TE: pair(3072, 768)})
    state, found = read_any(file)
    assert found == "kohya"
    assert state.spec.methods[Q_PATH] == LoRA(r=4, alpha=1.0)
    assert state.spec.methods["text_encoder.text_model.encoder.layers.11.mlp.fc1"] == LoRA(r=4, alpha=4.0)


def test_the_change_is_that_of_the_formula(tmp_path: Path) -> None:
    group = {**pair(), "alpha": torch.tensor(2.0)}
    state, _ = read_any(saved(tmp_path, **{Q: group}))
    A, B, scale = state.spec.methods[Q_PATH].factors(state.spec.shapes[Q_PATH], state.tensors[Q_PATH])  # type: ignore[attr-defined]
    want = 0.5 * group["lora_up.weight"] @ group["lora_down.weight"]
    torch.testing.assert_close(scale * B @ A, want)


def test_locon_with_a_middle_is_one_kernel(tmp_path: Path) -> None:
    down, mid, up = torch.randn(4, 320, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(320, 4, 1, 1)
    state, _ = read_any(
        saved(tmp_path, **{CONV: {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}})
    )
    assert state.spec.shapes[CONV_PATH].kernel == (3, 3)
    x = torch.randn(1, 320, 5, 5)
    conv = torch.nn.functional.conv2d
    want = conv(conv(conv(x, down), mid, padding=1), up)
    A = state.tensors[CONV_PATH]["lora_A"].reshape(4, 320, 3, 3)
    got = conv(conv(x, A, padding=1), state.tensors[CONV_PATH]["lora_B"].reshape(320, 4, 1, 1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)


def test_loha_of_a_convolution_takes_its_kernel_from_the_list(tmp_path: Path) -> None:
    group = {f"hada_w{k}_a": torch.randn(320, 2) for k in "12"}
    group |= {f"hada_w{k}_b": torch.randn(2, 320 * 9) for k in "12"}
    state, _ = read_any(saved(tmp_path, **{CONV: group}))
    assert isinstance(state.spec.methods[CONV_PATH], LoHa)
    assert state.spec.shapes[CONV_PATH].kernel == (3, 3)


def test_lokr_with_whole_factors_has_scale_one(tmp_path: Path) -> None:
    group = {"lokr_w1": torch.randn(16, 16), "lokr_w2": torch.randn(20, 20), "alpha": torch.tensor(1e9)}
    state, _ = read_any(saved(tmp_path, **{Q: group}))
    method = state.spec.methods[Q_PATH]
    assert isinstance(method, LoKr)
    assert method.alpha / method.r == 1


def test_dora_scale_along_the_outputs(tmp_path: Path) -> None:
    state, _ = read_any(saved(tmp_path, **{TE: {**pair(3072, 768), "dora_scale": torch.rand(3072, 1)}}))
    (method,) = state.spec.methods.values()
    assert isinstance(method, DoRA)


@pytest.mark.parametrize("size", [(1, 768), (768,)])
def test_dora_scale_along_the_inputs_is_the_function_of_early_lycoris(
    tmp_path: Path, size: tuple[int, ...]
) -> None:
    group = {**pair(3072, 768), "dora_scale": torch.rand(size)}
    state, _ = read_any(saved(tmp_path, **{TE: group}))
    ((path, method),) = state.spec.methods.items()
    assert method == InputDoRA(LoRA(r=method.inner.r, alpha=method.inner.alpha))  # type: ignore[attr-defined]
    W = torch.randn(3072, 768)
    V = W + method.inner.scale * group["lora_up.weight"] @ group["lora_down.weight"]  # type: ignore[attr-defined]
    theirs = group["dora_scale"].reshape(1, 768) * V / V.norm(dim=0, keepdim=True)
    torch.testing.assert_close(
        method.weight(ShapeTarget(path, state.spec.shapes[path]), state.parameters(path), W),
        theirs,  # type: ignore[attr-defined]
    )
    write_as(state, tmp_path / "again.safetensors", "kohya")
    again, _ = read_any(tmp_path / "again.safetensors")
    assert again.spec.methods == state.spec.methods
    assert torch.equal(again.tensors[path]["magnitude"], state.tensors[path]["magnitude"])


def test_a_dora_scale_that_could_be_either_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"may run along the 320 outputs or along as many inputs"):
        read_any(saved(tmp_path, **{Q: {**pair(320, 320), "dora_scale": torch.rand(320)}}))
    with pytest.raises(AdapterFileError, match=r"fits neither the 320 outputs nor the 320 inputs"):
        read_any(saved(tmp_path, **{Q: {**pair(320, 320), "dora_scale": torch.rand(5)}}))
    for size, kind in (((320, 1), DoRA), ((1, 320), InputDoRA)):
        state, _ = read_any(saved(tmp_path, **{Q: {**pair(320, 320), "dora_scale": torch.rand(size)}}))
        assert type(state.spec.methods[Q_PATH]) is kind


@pytest.mark.parametrize(
    ("stem", "group", "message"),
    [
        (Q, {"lora_down.weight": torch.randn(4, 320)}, "1 missing.*lora_up.weight"),
        (Q, {**pair(), "lora_upp.weight": torch.randn(2)}, "unexpected.*lora_upp.*Did you mean"),
        (Q, {**pair(), "hada_w1_a": torch.randn(2, 2)}, "hada_w1_b is missing"),
        (Q, pair(out=319), "is for a layer of 319 x 320"),
        (Q, {"lora_down.weight": torch.randn(4, 320), "lora_up.weight": torch.randn(320, 3)}, "no pair of factors"),
        (Q, {**pair(), "alpha": torch.tensor(float("nan"))}, "alpha is nan"),
        (Q, {**pair(), "alpha": torch.rand(2)}, "must be one number"),
        (Q, {"diff": torch.randn(320, 320)}, "whole difference"),
        (Q, {k: t.int() for k, t in pair().items()}, "int32"),
        (Q + "x", pair(), "no list|none of them|--names"),
        ("lora_unet_nothing", pair(), "--names"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, stem: str, group: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(AdapterFileError, match=message):
        read_any(saved(tmp_path, **{TE: pair(3072, 768), stem: group}))


def test_a_name_that_is_nearly_known_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=f"Did you mean '{Q}'"):
        read_any(saved(tmp_path, **{TE: pair(3072, 768), f"{Q}x": pair()}))


def test_names_from_a_file_and_from_a_model(tmp_path: Path) -> None:
    file = saved(tmp_path, lora_unet_my_net_0_fc_1=pair(6, 5))
    (tmp_path / "names.txt").write_text("my_net.0.fc_1\nmy_net.0.fc_2\n")
    state, _ = read_any(file, hints=Hints(names=read_names([str(tmp_path / "names.txt")])))
    assert list(state.spec.methods) == ["my_net.0.fc_1"]
    save_file({"my_net.0.fc_1.weight": torch.zeros(6, 5)}, tmp_path / "model.safetensors")
    names = read_names([f"unet={tmp_path / 'model.safetensors'}"])
    state, _ = read_any(file, hints=Hints(names=names))
    assert list(state.spec.methods) == ["unet.my_net.0.fc_1"]
    save_file({"my_net.0.fc_1.weight": torch.zeros(7, 5)}, tmp_path / "model.safetensors")
    with pytest.raises(AdapterFileError, match="of another size"):
        read_any(file, hints=Hints(names=read_names([f"unet={tmp_path / 'model.safetensors'}"])))


def test_two_layers_of_one_flattened_name(tmp_path: Path) -> None:
    names = Names("two", {"unet.a.b_c": (), "unet.a_b.c": ()})
    file = saved(tmp_path, lora_unet_a_b_c=pair())
    with pytest.raises(AdapterFileError, match="one and the same without their dots"):
        read_any(file, hints=Hints(names=names))


def test_sdxl_goes_by_its_first_names(tmp_path: Path) -> None:
    file = saved(
        tmp_path,
        lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q=pair(640, 640),
        lora_te1_text_model_encoder_layers_0_mlp_fc1=pair(3072, 768),
        lora_te2_text_model_encoder_layers_0_mlp_fc1=pair(5120, 1280),
    )
    result = convert(file, tmp_path / "d.safetensors", "diffusers")
    assert result.targets == 3
    keys = set(load_file(tmp_path / "d.safetensors"))
    assert "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in keys
    assert "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_B.weight" in keys
    state, _ = read_any(tmp_path / "d.safetensors")
    write_as(state, tmp_path / "k.safetensors", "kohya", hints=Hints(names=read_names(["sdxl"])))
    assert {key.partition(".")[0] for key in load_file(tmp_path / "k.safetensors")} == {
        key.partition(".")[0] for key in load_file(file)
    }


def test_what_cannot_be_told_apart_is_not_written(tmp_path: Path) -> None:
    file = saved(tmp_path, lora_unet_a=pair(), lora_unet_b=pair())
    state, _ = read_any(file, hints=Hints(names=Names("two", {"unet.x.y_z": (), "unet.b": (), "unet.a": ()})))
    from lorakit.io.formats.convert import _renamed

    odd = _renamed(state, {"unet.a": "unet.x.y_z", "unet.b": "unet.x_y.z"})
    with pytest.raises(AdapterFileError, match="cannot tell them apart"):
        write_as(odd, tmp_path / "k.safetensors", "kohya")
    assert not (tmp_path / "k.safetensors").exists()


def test_rslora_keeps_its_scale(tmp_path: Path) -> None:
    state, _ = read_any(saved(tmp_path, **{Q: pair()}))
    from lorakit.core import AdapterSpec, AdapterState

    method = LoRA(r=4, alpha=3.0, scaling="rslora", dropout=0.1)
    told = AdapterState(AdapterSpec({Q_PATH: method}, state.spec.shapes), state.tensors)
    losses = write_as(told, tmp_path / "k.safetensors", "kohya")
    assert len(losses) == 2
    again, _ = read_any(tmp_path / "k.safetensors")
    assert again.spec.methods[Q_PATH].scale == method.scale  # type: ignore[attr-defined]
