"""Files that PEFT wrote are read; files that we write are read by PEFT, with the same keys, tensors and settings."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.core import AdapterState
from lorakit.io import Outline, read, why_not_peft, write
from lorakit.io.model_outline import outline_of
from lorakit.io.peft_config import DEFAULTS
from lorakit.methods import DoRA, LoRA
from tests.io.cases import CASES, TRANSPOSED, Case
from tests.io.states import assert_equal

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")  # theirs, and many


def save(case: Case, directory: Path) -> object:
    model = case.adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    return model


def load_strictly(case: Case, directory: Path) -> object:
    """PEFT's loading, with what it only warns of, or says nothing about, made an error."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(case.base(), directory, is_trainable=True)
    assert not [
        str(w.message)
        for w in told
        if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()
    ]
    return model


def delta_in_peft(model: object, path: str) -> torch.Tensor:
    """What PEFT itself says that the adapter adds to the weight at one of our paths."""
    inner = model.base_model.model
    owner, _, name = path.rpartition(".")
    module = inner.get_submodule(owner) if owner else inner
    if type(module).__name__ == "ParamWrapper":
        while module.parameter_name != name:
            module = module.base_layer
        return module.get_delta_weight("default")
    if name == "in_proj_weight":
        return module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
    if type(module).__name__ == "MultiheadAttention":
        module = module.base_layer
    layer = getattr(module, name)
    return layer.get_delta_weight("default")


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_peft_is_read(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = save(case, tmp_path)
    state = read(tmp_path)
    assert {path: method.name for path, method in state.spec.methods.items()} == case.targets
    for path, method in state.spec.methods.items():
        tensors, shape = state.tensors[path], state.spec.shapes[path]
        lora = method.inner if isinstance(method, DoRA) else method
        if isinstance(lora, LoRA):
            ours = lora.delta(shape, tensors)
            theirs = delta_in_peft(model, path)
            if shape.kind in ("embedding", "linear") and theirs.shape != ours.shape:
                theirs = theirs.mT  # the layout in which the layer stores its weight
            torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("outlined", [False, True], ids=["alone", "outline"])
@pytest.mark.parametrize("name", CASES)
def test_what_we_write_is_what_peft_reads(name: str, outlined: bool, tmp_path: Path) -> None:
    case = CASES[name]
    model = save(case, tmp_path / "theirs")
    outline = outline_of(case.base()) if outlined else None
    state = read(tmp_path / "theirs", outline=outline)
    assert why_not_peft(state, outline=outline) == []
    write(state, tmp_path / "ours", outline=outline)
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")]
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    for key, tensor in files[0].items():
        assert torch.equal(tensor, files[1][key]), key
    assert configs[0].keys() == configs[1].keys() == DEFAULTS.keys()
    same = {k for k in configs[0] if configs[0][k] == configs[1][k]}
    assert configs[0].keys() - same <= {
        "r",
        "rank_pattern",
        "lora_alpha",
        "alpha_pattern",
    }  # these may be put more briefly
    if name not in ("patterns", "attention"):
        assert configs[0] == configs[1]
    again = load_strictly(case, tmp_path / "ours")
    theirs, ours = (peft.get_peft_model_state_dict(m, save_embedding_layers=False) for m in (model, again))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert torch.equal(tensor, ours[key]), key
    x = case.input()
    torch.testing.assert_close(_output(again.eval()(x)), _output(model(x)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [*CASES, "transposed"])
def test_an_outline_is_drawn_only_for_a_file_that_leaves_something_to_the_model(
    name: str, tmp_path: Path
) -> None:
    case = {**CASES, "transposed": TRANSPOSED}[name]
    save(case, tmp_path)
    outline, drawn = outline_of(case.base()), []

    def draw() -> Outline:
        drawn.append(outline)
        return outline

    assert_equal(read(tmp_path, outline=draw), read(tmp_path, outline=outline))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert bool(drawn) == any(config[key] for key in ("target_parameters", "trainable_token_indices"))


@pytest.mark.parametrize("name", CASES)
def test_settings_that_are_named_anew_fit_the_model(name: str, tmp_path: Path) -> None:
    """Without the hints that a read file leaves, targets and modules are named from their paths alone."""
    case = CASES[name]
    save(case, tmp_path / "theirs")
    state = read(tmp_path / "theirs")
    fresh = AdapterState(type(state.spec)(state.spec.methods, state.spec.shapes), state.tensors)
    write(fresh, tmp_path / "ours")
    again = load_strictly(case, tmp_path / "ours")
    file = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    held = again.state_dict()
    assert peft.get_peft_model_state_dict(again, save_embedding_layers=False).keys() <= file.keys()
    for key, tensor in file.items():
        inside = [
            k
            for k in held
            if k.replace(".default", "")
            .replace("modules_to_save.", "")
            .replace("magnitude_vector.weight", "magnitude_vector")
            == key
        ]
        assert inside, f"PEFT has no place for {key}"
        assert any(torch.equal(held[k], tensor) for k in inside), key


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    save(CASES[name], tmp_path / "theirs")
    state = read(tmp_path / "theirs")
    assert_equal(read(write(state, tmp_path / "ours")), state)


def test_transposed_experts_need_the_model(tmp_path: Path) -> None:
    model = save(TRANSPOSED, tmp_path / "theirs")
    outline = outline_of(TRANSPOSED.base())
    state = read(tmp_path / "theirs", outline=outline)
    for path, method in state.spec.methods.items():
        ours = method.delta(state.spec.shapes[path], state.tensors[path])
        torch.testing.assert_close(ours, delta_in_peft(model, path))
    write(state, tmp_path / "ours")  # what it knows of the model stays with it
    x = TRANSPOSED.input()
    torch.testing.assert_close(load_strictly(TRANSPOSED, tmp_path / "ours")(x), model(x))
    assert_equal(read(tmp_path / "ours"), state)


@pytest.mark.parametrize("form", ["no prefix", "adapter name", "compiled", "weight after magnitude"])
@pytest.mark.parametrize(
    "name", ["plain", "dora", "embedding-dora", "experts", "token-rows-tied", "modules-to-save"]
)
def test_other_forms_of_keys(name: str, form: str, tmp_path: Path) -> None:
    save(CASES[name], tmp_path / "a")
    state = read(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({_other(key, form): t for key, t in tensors.items()}, file)
    assert_equal(read(tmp_path / "a"), state)


def _other(key: str, form: str) -> str:
    if form == "no prefix":
        return key.removeprefix("base_model.model.")
    if form == "compiled":
        return key.replace("base_model.model.", "base_model.model._orig_mod.")
    if form == "weight after magnitude":
        return key.replace("magnitude_vector", "magnitude_vector.sql.weight")
    for leaf in (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "trainable_tokens_delta",
    ):
        key = key.replace(leaf, f"{leaf}.default")
    return key


def _output(y: object) -> torch.Tensor:
    return y if isinstance(y, torch.Tensor) else y.logits
