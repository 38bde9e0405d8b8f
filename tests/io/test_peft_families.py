"""PEFT's types beside LoRA, both ways, against PEFT itself: outputs, tensors, key sets, and what must not be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit as lk
from lorakit.errors import AdapterFileError
from lorakit.io.model_outline import outline_of
from lorakit.io.peft_families import FAMILIES
from tests.io.cases import Convs, Gpt2Like, Net, ids, randomise
from tests.io.test_peft_outputs import bert, gpt2, llama, output, same

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")  # theirs, and many

FC = ["fc1", "fc2"]


class FlatConvs(nn.Module):
    """A convolution in one and one in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 5, (3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).unsqueeze(-1).expand(-1, -1, -1, 4)).flatten(1)


@dataclass(frozen=True)
class Case:
    """A model and a configuration of PEFT's.

    Attributes:
        kind: The name of PEFT's configuration class.
        settings: Its arguments.
        model: Builds the base.
        input: For comparing outputs.
        finish: Called with PEFT's model before it is saved.
    """

    kind: str
    settings: dict[str, Any]
    model: Callable[[], nn.Module] = Net
    input: Callable[[], torch.Tensor] = ids
    finish: Callable[[Any], None] = field(default=lambda model: None)

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model().eval()

    def adapted(self) -> Any:
        """PEFT's model, with random non-zero weights in the adapter."""
        model = peft.get_peft_model(self.base(), getattr(peft, self.kind)(**self.settings))
        randomise(model)
        self.finish(model)
        return model.eval()


def prune(model: Any) -> None:
    """What PEFT does at the end of AdaLoRA: mask triplets, note which were kept, mask them on saving."""
    pattern, drawn = {}, torch.Generator().manual_seed(3)
    for n, (name, p) in enumerate(model.base_model.model.named_parameters()):
        if "lora_E" in name:
            kept = torch.rand(p.shape[0], generator=drawn) < (0 if n % 5 == 4 else 0.6)
            p.data[~kept] = 0
            pattern[name] = kept.tolist()
    assert any(all(mask) is False and any(mask) for mask in pattern.values())
    model.peft_config["default"].rank_pattern = pattern


def image() -> torch.Tensor:
    return torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))


def vectors() -> torch.Tensor:
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))


ADALORA = {"init_r": 6, "target_r": 3, "total_step": 20, "tinit": 2, "tfinal": 3, "lora_alpha": 5}
VERA = {"r": 5, "d_initial": 0.2, "projection_prng_key": 3}
CASES: dict[str, Case] = {
    "adalora": Case("AdaLoraConfig", {**ADALORA, "target_modules": FC}),
    "adalora-saved-modules": Case(
        "AdaLoraConfig",
        {**ADALORA, "target_modules": ["fc1"], "modules_to_save": ["head"], "lora_dropout": 0.1},
    ),
    "adalora-bias": Case("AdaLoraConfig", {**ADALORA, "target_modules": FC, "bias": "lora_only"}),
    "adalora-pruned": Case("AdaLoraConfig", {**ADALORA, "target_modules": FC}, finish=prune),
    "adalora-gpt2": Case(
        "AdaLoraConfig", {**ADALORA, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, gpt2
    ),
    "vera": Case("VeraConfig", {**VERA, "target_modules": FC, "vera_dropout": 0.1}),
    "vera-without-projections": Case("VeraConfig", {**VERA, "target_modules": FC, "save_projection": False}),
    "vera-conv1d-of-transformers": Case(
        "VeraConfig",
        {**VERA, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        Gpt2Like,
        vectors,
    ),
    "vera-llama": Case("VeraConfig", {**VERA, "target_modules": ["q_proj", "v_proj", "down_proj"]}, llama),
    "vera-bias": Case("VeraConfig", {**VERA, "target_modules": FC, "bias": "vera_only"}),
    "loha": Case("LoHaConfig", {"r": 3, "alpha": 5, "target_modules": FC}),
    "loha-patterns": Case(
        "LoHaConfig",
        {
            "r": 3,
            "alpha": 5,
            "target_modules": FC,
            "rank_pattern": {"fc2": 2},
            "alpha_pattern": {"^block.1.fc1": 7},
        },
    ),
    "loha-saved-modules": Case(
        "LoHaConfig", {"r": 3, "target_modules": ["fc1"], "modules_to_save": ["head", "norm"]}
    ),
    "loha-convolutions": Case("LoHaConfig", {"r": 3, "target_modules": ["one", "two"]}, FlatConvs, image),
    "loha-cores": Case(
        "LoHaConfig",
        {"r": 3, "target_modules": ["one", "two"], "use_effective_conv2d": True},
        FlatConvs,
        image,
    ),
    "lokr": Case("LoKrConfig", {"r": 2, "alpha": 5, "target_modules": FC}),
    "lokr-both-low-rank": Case(
        "LoKrConfig",
        {"r": 1, "alpha": 5, "target_modules": FC, "decompose_both": True, "init_weights": "lycoris"},
    ),
    "lokr-factor": Case("LoKrConfig", {"r": 2, "target_modules": FC, "decompose_factor": 2}),
    "lokr-factor-above-the-root": Case("LoKrConfig", {"r": 1, "target_modules": FC, "decompose_factor": 8}),
    "lokr-factor-above-the-root-both": Case(
        "LoKrConfig", {"r": 1, "target_modules": FC, "decompose_factor": 8, "decompose_both": True}
    ),
    "lokr-convolutions": Case("LoKrConfig", {"r": 1, "target_modules": ["one", "two"]}, FlatConvs, image),
    "lokr-cores": Case(
        "LoKrConfig",
        # PEFT cannot run what it makes of a core in one dimension.
        {"r": 1, "target_modules": ["two"], "use_effective_conv2d": True, "decompose_both": True},
        FlatConvs,
        image,
    ),
    "lokr-llama": Case("LoKrConfig", {"r": 1, "target_modules": "all-linear"}, llama),
    "ia3": Case("IA3Config", {"target_modules": FC, "feedforward_modules": ["fc2"]}),
    "ia3-outputs": Case("IA3Config", {"target_modules": FC, "feedforward_modules": []}),
    "ia3-expression": Case(
        "IA3Config", {"target_modules": r".*\.fc[12]", "feedforward_modules": r".*\.1\.fc.|.*0\.fc2"}
    ),
    "ia3-saved-modules": Case(
        "IA3Config",
        {
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
            "task_type": "SEQ_CLS",
        },
        bert,
    ),
    "ia3-convolutions": Case(
        "IA3Config", {"target_modules": ["two", "three"], "feedforward_modules": ["three"]}, Convs, image
    ),
    "ia3-gpt2": Case(
        "IA3Config",
        {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
        },
        gpt2,
    ),
}
each = pytest.mark.parametrize("name", CASES)


def of_peft(case: Case, directory: Path, x: torch.Tensor) -> torch.Tensor:
    """What PEFT computes with a file."""
    return output(peft.PeftModel.from_pretrained(case.base(), directory).eval(), x)


@each
def test_made_by_peft(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    x, made = case.input(), case.adapted()
    made.save_pretrained(tmp_path)
    model = case.base()
    base = output(model, x)
    lk.load(model, tmp_path, name="sql")
    ours = output(model, x)
    same(ours, output(made, x), base)
    same(ours, of_peft(case, tmp_path, x), base)
    with lk.use(model, None):
        assert torch.equal(output(model, x), base)
    lk.merge(model, "sql")
    torch.testing.assert_close(output(model, x), ours, atol=1e-5, rtol=1e-5)


@each
def test_read_and_written_back_it_is_the_same_file(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    case.adapted().save_pretrained(tmp_path / "theirs")
    model = case.base()
    lk.load(model, tmp_path / "theirs")
    lk.save(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    if name == "vera-without-projections":  # ours are always there
        ours = {key: t for key, t in ours.items() if key.rpartition(".")[2] not in ("vera_A", "vera_B")}
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
    before, after = (
        json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")
    )
    assert set(after) == set(before)
    odd = {
        key: (before[key], after[key])
        for key in before
        if _sorted(before[key]) != _sorted(after[key]) and key not in SAID_OTHERWISE
    }
    assert not odd
    outline = outline_of(model)
    assert (
        lk.read(tmp_path / "ours").spec.methods == lk.read(tmp_path / "theirs", outline=outline).spec.methods
    )
    if name == "adalora-pruned":
        for key, mask in before["rank_pattern"].items():
            assert sum(after["rank_pattern"][key]) == sum(mask)


SAID_OTHERWISE = ("alpha_pattern", "rank_pattern", "save_projection")


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


@each
def test_made_here(name: str, tmp_path: Path) -> None:
    """From a fresh attachment: no hint of PEFT's is left in what is saved."""
    case = CASES[name]
    x = case.input()
    case.adapted().save_pretrained(tmp_path / "theirs")
    model = case.base()
    base = output(model, x)
    methods = lk.read(tmp_path / "theirs", outline=outline_of(model)).spec.methods
    lk.attach(model, dict(methods), name="sql")
    randomise(model)
    ours = output(model, x)
    lk.save(model, tmp_path / "ours", name="sql")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] in FAMILIES
    same(ours, of_peft(case, tmp_path / "ours", x), base)
    again = case.base()
    lk.load(again, tmp_path / "ours", name="other")
    torch.testing.assert_close(output(again, x), ours, atol=1e-6, rtol=1e-6)
    without_model = lk.read(tmp_path / "ours")
    assert without_model.spec.shapes == lk.extract(model, "sql").spec.shapes


def saved(tmp_path: Path, name: str) -> tuple[Case, dict[str, torch.Tensor], dict[str, Any]]:
    case = CASES[name]
    case.adapted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    return case, dict(load_file(tmp_path / "adapter_model.safetensors")), config


def rewrite(tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file({key: t.contiguous() for key, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))


STRICT = pytest.mark.parametrize("name", ["adalora", "vera", "loha", "lokr", "ia3"])


@STRICT
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    case, tensors, config = saved(tmp_path, name)
    gone = sorted(key for key in tensors if ".block.0.fc1." in key)[0]
    del tensors[gone]
    rewrite(tmp_path, tensors, config)
    if name == "ia3":  # a target's only tensor: the file then has no such target
        assert "block.0.fc1" not in lk.read(tmp_path, outline=outline_of(case.base())).spec.methods
        return
    with pytest.raises(AdapterFileError, match=r"block\.0\.fc1"):
        lk.load(case.base(), tmp_path)


@STRICT
def test_an_unexpected_tensor_is_named(name: str, tmp_path: Path) -> None:
    case, tensors, config = saved(tmp_path, name)
    tensors["base_model.model.block.0.fc1.lora_Z.weight"] = torch.zeros(2)
    rewrite(tmp_path, tensors, config)
    with pytest.raises(AdapterFileError, match="lora_Z"):
        lk.load(case.base(), tmp_path)


@STRICT
def test_a_tensor_of_another_size_is_named(name: str, tmp_path: Path) -> None:
    case, tensors, config = saved(tmp_path, name)
    key = sorted(key for key in tensors if ".block.0.fc1." in key)[-1]
    tensors[key] = torch.zeros(*tensors[key].shape[:-1], tensors[key].shape[-1] + 3)
    rewrite(tmp_path, tensors, config)
    with pytest.raises((AdapterFileError, lk.LorakitError), match=r"block\.0\.fc1"):
        lk.load(case.base(), tmp_path)


@STRICT
def test_an_unknown_setting_is_refused(name: str, tmp_path: Path) -> None:
    case, tensors, config = saved(tmp_path, name)
    rewrite(tmp_path, tensors, {**config, "use_something_new": True})
    with pytest.raises(AdapterFileError, match="use_something_new"):
        lk.load(case.base(), tmp_path)
    assert lk.read(tmp_path, ignore=["use_something_new"], outline=outline_of(case.base())).numel


def test_projections_that_are_left_out_need_the_model(tmp_path: Path) -> None:
    CASES["vera-without-projections"].adapted().save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"lorakit\.load"):
        lk.read(tmp_path)


def test_a_type_that_is_no_word_is_refused(tmp_path: Path) -> None:
    _, tensors, config = saved(tmp_path, "loha")
    rewrite(tmp_path, tensors, {**config, "peft_type": ["LOHA"]})
    with pytest.raises(AdapterFileError, match="peft_type"):
        lk.read(tmp_path)


@pytest.mark.parametrize("name", ["loha", "vera"])
def test_a_start_is_not_taken_for_a_type_that_has_none(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    case.adapted().save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=rf"{name.upper()} takes no start from the base"):
        lk.read(tmp_path, initial=tmp_path)


def test_adalora_with_dora_is_refused(tmp_path: Path) -> None:
    _, tensors, config = saved(tmp_path, "adalora")
    rewrite(tmp_path, tensors, {**config, "use_dora": True})
    with pytest.raises(AdapterFileError, match="use_dora"):
        lk.read(tmp_path)


WHY = {
    "embedding": ({"embed_tokens": lk.LoHa(r=2)}, Net, "embedding"),
    "two types": ({"fc1": lk.LoHa(r=2), "fc2": lk.LoRA(r=2)}, Net, "one type"),
    "lycoris scale": ({"fc1": lk.LoKr(r=2, scaling="lycoris")}, Net, "LyCORIS"),
    "two factors": ({"fc1": lk.LoKr(r=2), "fc2": lk.LoKr(r=2, factor=2)}, Net, "one factor"),
    "three dimensions": ({"three": lk.LoHa(r=2)}, Convs, "one and two dimensions"),
    "wide projections": ({"fc1": lk.VeRA(r=2, max_in=20)}, Net, "largest"),
    "two schedules": ({"fc1": lk.AdaLoRA(), "fc2": lk.AdaLoRA(alpha=3)}, Net, "one alpha"),
    "squared penalty": ({"fc1": lk.AdaLoRA(init_r=4, target_r=2, orth_reg="squared")}, Net, "square"),
    "transformers' Conv1D": ({"c_attn": lk.LoHa(r=2)}, Gpt2Like, "Conv1D"),
    "one dimension": ({"one": lk.IA3()}, Convs, "two and three dimensions"),
}


@pytest.mark.parametrize("name", WHY)
def test_what_peft_has_no_words_for_is_kept_in_our_own_form(name: str, tmp_path: Path) -> None:
    methods, build, reason = WHY[name]
    torch.manual_seed(0)
    model = build()
    if name == "two schedules":
        methods = {key: lk.AdaLoRA(init_r=4, target_r=2, alpha=a) for key, a in (("fc1", 2), ("fc2", 3))}
    lk.attach(model, methods)
    randomise(model)
    lk.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORAKIT"
    assert any(reason in why for why in config["lorakit"]["why_not_peft"]), config["lorakit"]["why_not_peft"]
    state, again = lk.extract(model), lk.read(tmp_path)
    assert again.spec.methods == state.spec.methods
    for path, tensor_name, tensor in state.all_tensors():
        assert torch.equal((again.tensors[path] if path else again.shared)[tensor_name], tensor)
