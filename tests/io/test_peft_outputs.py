"""The same adapter computes the same in PEFT and here, whichever of the two made the file."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.io.model_outline import outline_of
from lorakit.methods import FullFineTuning
from tests.io.cases import CASES, TRANSPOSED, Case, ids, randomise

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")  # theirs, and many

SIZES = {
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
FC = {"r": 2, "lora_alpha": 6}


def llama(tie: bool = False) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tie))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=17, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    )


def bert() -> nn.Module:
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)
    )


def qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        **SIZES,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
    )
    return transformers.Qwen2MoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=16,
    )
    model = transformers.GptOssForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


MODELS = {
    "llama": Case(llama, {**FC, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}, {}, ids),
    "llama-dora": Case(llama, {**FC, "target_modules": ["q_proj", "down_proj"], "use_dora": True}, {}, ids),
    "llama-embedding-and-head": Case(
        llama, {**FC, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}, {}, ids
    ),
    "gpt2": Case(
        gpt2,
        {**FC, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_rslora": True},
        {},
        ids,
    ),
    "gpt2-dora": Case(
        gpt2,
        {**FC, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
        {},
        ids,
    ),
    "bert-classifier": Case(
        bert, {**FC, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}, {}, ids
    ),
    "bert-bias": Case(
        bert,
        {**FC, "target_modules": ["query", "value"], "bias": "all", "modules_to_save": ["classifier"]},
        {},
        ids,
    ),
    "mixtral": Case(mixtral, {**FC, "target_modules": ["q_proj"], "target_parameters": EXPERTS}, {}, ids),
    "mixtral-router": Case(
        mixtral, {**FC, "target_modules": [], "target_parameters": [*EXPERTS, "gate.weight"]}, {}, ids
    ),
    "qwen2-moe": Case(
        qwen2_moe,
        {
            **FC,
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 3},
        },
        {},
        ids,
    ),
    "gpt-oss": Case(gpt_oss, {**FC, "target_modules": [], "target_parameters": EXPERTS}, {}, ids),
}
ALL = {**CASES, "transposed": TRANSPOSED, **MODELS}


def output(model: Callable[[torch.Tensor], Any], x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def of_peft(case: Case, directory: Path, x: torch.Tensor) -> torch.Tensor:
    """What PEFT computes with a file; for attention what it should compute, as it adds the change of out_proj twice."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(case.base(), directory).eval()
    assert not [w for w in told if "missing" in str(w.message).lower()]
    twice = [m for m in model.modules() if type(m).__name__ == "MultiheadAttention" and hasattr(m, "lora_A")]
    if not twice:
        return output(model, x)
    plain = case.base()
    for path, module in model.base_model.model.named_modules():
        if module in twice:
            attention = plain.get_submodule(path)
            delta = (
                module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
            )
            attention.in_proj_weight.data += delta
            attention.out_proj.weight.data += module.base_layer.out_proj.get_delta_weight("default")
            attention.out_proj.bias.data.copy_(module.base_layer.out_proj.base_layer.bias)
        elif isinstance(module, peft.tuners.lora.Linear) and "out_proj" not in path:
            plain.get_submodule(path).weight.data += module.get_delta_weight("default")
    return output(plain, x)


def same(ours: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (theirs - base).abs().max() > 1e-3  # the adapter does something


@pytest.mark.parametrize("name", ALL)
def test_made_by_peft(name: str, tmp_path: Path) -> None:
    case = ALL[name]
    x = case.input()
    made = case.adapted()
    made.save_pretrained(tmp_path)
    model = case.base()
    base = output(model, x)
    lk.load(model, tmp_path, name="sql")
    ours = output(model, x)
    same(ours, of_peft(case, tmp_path, x), base)
    if not any(type(m).__name__ == "MultiheadAttention" for m in made.modules()):
        same(ours, output(made, x), base)
    with lk.use(model, None):
        torch.testing.assert_close(output(model, x), base, atol=0, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_made_here(name: str, tmp_path: Path) -> None:
    """From a fresh attachment: no hint of PEFT's is left in what is saved."""
    case = ALL[name]
    x = case.input()
    case.adapted().save_pretrained(tmp_path / "theirs")
    model = case.base()
    base = output(model, x)
    methods = lk.read(tmp_path / "theirs", outline=outline_of(model)).spec.methods
    lk.attach(model, dict(methods), name="sql")
    randomise(model)
    ours = output(model, x)
    lk.save(model, tmp_path / "ours", name="sql")
    same(ours, of_peft(case, tmp_path / "ours", x), base)
    again = case.base()
    lk.load(again, tmp_path / "ours", name="other")
    torch.testing.assert_close(output(again, x), ours, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert-classifier"])
def test_settings_are_brief_when_the_model_is_at_hand(name: str, tmp_path: Path) -> None:
    case = MODELS[name]
    case.adapted().save_pretrained(tmp_path / "theirs")
    model = case.base()
    methods = dict(lk.read(tmp_path / "theirs", outline=outline_of(model)).spec.methods)
    lk.attach(model, methods)
    lk.save(model, tmp_path / "ours")
    ours, theirs = (
        json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")
    )
    assert sorted(ours["target_modules"]) == sorted({m.rpartition(".")[2] for m in theirs["target_modules"]})
    assert ours["fan_in_fan_out"] == theirs["fan_in_fan_out"]


def test_half_a_module_is_not_said_in_peft(tmp_path: Path) -> None:
    model = bert()
    lk.attach(model, {"query": lk.LoRA(r=2), "classifier.weight": FullFineTuning()})
    lk.save(model, tmp_path)
    state = lk.read(tmp_path)
    assert "classifier.weight" in state.spec.methods
    with pytest.raises(Exception, match="LORAKIT"):
        peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
