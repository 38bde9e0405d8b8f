"""Strictness: whatever is missing, left over, or of another size is told, by name, all at once."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.errors import AdapterFileError
from lorakit.io.outline import Outline
from lorakit.io.peft_reader import read_peft
from lorakit.methods import DoRA, LoRA

P = "base_model.model."


def config(**settings: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"], **settings}


def fc(n: int = 0) -> dict[str, Tensor]:
    return {
        f"{P}layers.{n}.fc.lora_A.weight": torch.randn(2, 6),
        f"{P}layers.{n}.fc.lora_B.weight": torch.randn(4, 2),
    }


def fails(match: str, tensors: dict[str, Tensor], **settings: Any) -> str:
    with pytest.raises(AdapterFileError, match=match) as caught:
        read_peft(config(**settings), tensors)
    return str(caught.value)


def test_what_is_read() -> None:
    tensors = {**fc(10), **fc(2)}
    state = read_peft(config(lora_dropout=0.1, base_model_name_or_path="org/base"), tensors)
    assert list(state.spec.methods) == ["layers.2.fc", "layers.10.fc"]
    assert state.spec.methods["layers.2.fc"] == LoRA(r=2, alpha=4, dropout=0.1)
    assert state.spec.base == "org/base"
    assert state.tensors["layers.2.fc"]["lora_A"] is not None
    assert torch.equal(state.tensors["layers.10.fc"]["lora_B"], tensors[f"{P}layers.10.fc.lora_B.weight"])


def test_an_a_without_its_b() -> None:
    tensors = {**fc(0), **fc(1)}
    del tensors[f"{P}layers.1.fc.lora_B.weight"]
    fails(r"1 missing: layers.1.fc.lora_B.weight", tensors)


def test_a_b_without_its_a_and_the_near_match() -> None:
    tensors = {**fc(0), **fc(1)}
    tensors[f"{P}layers.1.fc.lora_AA.weight"] = tensors.pop(f"{P}layers.1.fc.lora_A.weight")
    text = fails(r"1 missing: layers.1.fc.lora_A.weight.*1 unexpected", tensors)
    assert "Did you mean 'base_model.model.layers.1.fc.lora_AA.weight'" in text


def test_all_problems_are_told_at_once() -> None:
    tensors = {**fc(0), **fc(1), **fc(2), f"{P}layers.0.norm.weight": torch.ones(3)}
    del tensors[f"{P}layers.1.fc.lora_A.weight"]
    tensors[f"{P}layers.2.fc.lora_A.weight"] = torch.randn(3, 6)
    text = fails("1 missing", tensors)
    assert "1 unexpected: base_model.model.layers.0.norm.weight" in text
    assert "layers.2.fc.lora_A.weight is (3, 6), not (2, 6) (by the configuration r=2 there)" in text


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("layers.0.fc.lora_B.bias", {}),  # lora_bias is not set
        ("layers.0.fc.lora_A.bias", {}),
        ("layers.0.fc.lora_magnitude_vector", {}),  # use_dora is not set
        ("layers.0.fc.lora_embedding_A", {}),
        ("layers.0.fc.bias", {"bias": "none"}),
        ("layers.0.other.bias", {"bias": "lora_only"}),
        ("layers.0.fc.weight", {}),
        ("head.weight", {"modules_to_save": None}),
        ("layers.0.fc.lora_E", {}),
        ("fc.original_module.bias", {"bias": "all"}),
    ],
)
def test_tensors_that_nothing_asked_for(key: str, settings: dict[str, Any]) -> None:
    fails("unexpected|missing", {**fc(), P + key: torch.randn(4)}, **settings)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"use_dora": True}, "layers.0.fc.lora_magnitude_vector"),
        ({"lora_bias": True}, "layers.0.fc.lora_B.bias"),
        ({"modules_to_save": ["head"]}, "modules_to_save"),
    ],
)
def test_tensors_that_the_configuration_asks_for(settings: dict[str, Any], what: str) -> None:
    assert what in fails("1 missing", fc(), **settings)


def test_the_rank_decides_the_scale_so_it_must_fit() -> None:
    fails("by the configuration r=4 there", fc(), rank_pattern={"fc": 4})


def test_patterns_are_asked_in_order() -> None:
    tensors = {**fc(0), **fc(1)}
    state = read_peft(config(alpha_pattern={"^layers.0.fc": 7, "fc": 9, "layers.1.fc": 1}), tensors)
    assert [m.alpha for m in state.spec.methods.values()] == [7, 9]


def test_shards_that_were_not_gathered() -> None:
    tensors = fc()
    tensors[f"{P}layers.0.fc.lora_A.weight"] = torch.zeros(0)
    fails("no pair of factors", tensors)


def test_a_grouped_convolution_is_refused_with_the_reason() -> None:
    tensors = {
        f"{P}conv.lora_A.weight": torch.randn(4, 8, 3, 3),
        f"{P}conv.lora_B.weight": torch.randn(12, 2, 1, 1),
    }
    fails("convolution in 2 groups", tensors, r=4)


def test_a_buffer_is_no_parameter() -> None:
    tensors = {**fc(), f"{P}bn.num_batches_tracked": torch.tensor(3), f"{P}bn.weight": torch.ones(2)}
    fails("batch norm", tensors, modules_to_save=["bn"])


def test_no_tensors_at_all() -> None:
    fails("holds no tensors", {})


def test_dora_on_what_peft_has_no_dora_for() -> None:
    tensors = {f"{P}mlp.lora_A.weight": torch.randn(2, 6), f"{P}mlp.lora_B.weight": torch.randn(4, 2)}
    fails(
        "no DoRA for a bare parameter",
        tensors,
        use_dora=True,
        target_modules=[],
        target_parameters=["mlp.down_proj"],
    )


@pytest.mark.parametrize(
    "settings",
    [{"r": 0}, {"lora_dropout": 1.5}, {"rank_pattern": {"(": 2}}, {"alpha_pattern": {"fc": float("inf")}}],
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    fails("makes no sense", fc(), **settings)


def test_inits_that_leave_the_base_alone_are_remembered() -> None:
    for init in (False, "eva", "orthogonal", "mica"):
        state = read_peft(config(init_lora_weights=init), fc())
        assert state.spec.methods["layers.0.fc"] == LoRA(r=2, alpha=4)
        assert state.spec.info["peft"]["init_lora_weights"] == init
    assert (
        read_peft(config(init_lora_weights="gaussian"), fc()).spec.methods["layers.0.fc"].init == "gaussian"
    )


def test_the_copy_for_when_the_adapter_is_off_is_not_the_adapters() -> None:
    bias = torch.randn(3)
    tensors = {
        **fc(), f"{P}head.weight": torch.randn(3, 4), f"{P}head.bias": bias,
        f"{P}head.modules_to_save.bias": bias, f"{P}head.original_module.bias": torch.zeros(3),
    }  # fmt: skip
    state = read_peft(config(modules_to_save=["head"], bias="all"), tensors)
    assert torch.equal(state.tensors["head.bias"]["value"].squeeze(-1), bias)
    tensors[f"{P}head.modules_to_save.bias"] = bias + 1
    fails("twice.*different values", tensors, modules_to_save=["head"], bias="all")


def test_experts_with_the_sizes_of_the_model() -> None:
    """One expert, or none: a file does not tell a matrix from a stack of one."""
    tensors = {f"{P}mlp.lora_A.weight": torch.randn(2, 6), f"{P}mlp.lora_B.weight": torch.randn(4, 2)}
    settings = config(target_modules=[], target_parameters=["mlp.down_proj"])
    assert read_peft(settings, tensors).spec.shapes["mlp.down_proj"].stored == (4, 6)
    outline = Outline({"mlp.down_proj": (1, 4, 6)})
    assert read_peft(settings, tensors, outline=outline).spec.shapes["mlp.down_proj"].stored == (1, 4, 6)
    with pytest.raises(AdapterFileError, match="of another size"):
        read_peft(settings, tensors, outline=Outline({"mlp.down_proj": (1, 4, 7)}))


def test_experts_whose_rows_are_no_multiple_of_the_rank() -> None:
    tensors = {f"{P}mlp.lora_A.weight": torch.randn(5, 6), f"{P}mlp.lora_B.weight": torch.randn(4, 5)}
    fails("no stack of factors of rank 2", tensors, target_modules=[], target_parameters=["mlp.down_proj"])


def test_one_method_object_serves_all_targets_of_a_kind() -> None:
    state = read_peft(config(), {**fc(0), **fc(1)})
    assert state.spec.methods["layers.0.fc"] is state.spec.methods["layers.1.fc"]
    tensors = {
        k: v
        for n in range(2)
        for k, v in {**fc(n), f"{P}layers.{n}.fc.lora_magnitude_vector": torch.ones(4)}.items()
    }
    assert read_peft(config(use_dora=True), tensors).spec.methods["layers.1.fc"] == DoRA(LoRA(r=2, alpha=4))


EVIL = r"((l|la|y|e|r|s|\.|0)+)+\.never"


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {EVIL: 4}},
        {"alpha_pattern": {EVIL: 4}},
        {"target_modules": EVIL, "target_parameters": ["w"]},
    ],
    ids=["rank_pattern", "alpha_pattern", "target_modules"],
)
def test_an_evil_expression_in_a_file_is_matched_at_once(settings: dict[str, Any]) -> None:
    """`re` would go on for years on a path as long as this."""
    name = "layers." * 12 + "0.fc"
    tensors = {f"{P}{name}.lora_A.weight": torch.randn(2, 6), f"{P}{name}.lora_B.weight": torch.randn(4, 2)}
    started = time.perf_counter()
    assert list(read_peft(config(**settings), tensors).spec.methods)
    assert time.perf_counter() - started < 5


def test_an_expression_that_is_not_followed_is_told_with_its_file() -> None:
    says = fails("adapter_config.json makes no sense", fc(), rank_pattern={r"(fc)\1": 4})
    assert "back-reference" in says
    assert "name the layers in a list" in says
