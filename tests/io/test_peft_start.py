"""Adapters that are measured from their start: PEFT's two files made one, and what our own files keep of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakit as lk
from lorakit.core import AdapterState
from lorakit.errors import AdapterFileError
from lorakit.io import why_not_peft, write
from lorakit.io.peft_start import with_start
from tests.attach.small_models import Mlp
from tests.contracts.kinds import Experts, Host
from tests.io.states import assert_equal


def trained(
    method: Any, model: nn.Module | None = None, targets: Any = ("fc1", "fc2")
) -> tuple[nn.Module, AdapterState]:
    """A model with an adapter that has moved from its start, and the adapter as it was before."""
    torch.manual_seed(0)
    model = model or Mlp()
    lk.attach(model, method, list(targets))
    before = lk.extract(model)
    with torch.no_grad():
        for p in lk.trainable(model).values():
            p.add_(0.1 * torch.randn_like(p))
    return model, before


PISSA = lk.LoRA(r=2, alpha=3, init="pissa", rank_pattern={"fc2": 4})
METHODS = {
    "pissa": PISSA,
    "olora rslora": lk.LoRA(r=2, alpha=3, scaling="rslora", init="olora", dropout=0.1),
    "dora pissa": lk.DoRA(PISSA),
    "bias": lk.LoRA(r=2, init="pissa_niter_4", bias=True),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_our_own_form_keeps_the_start(method: Any, tmp_path: Path) -> None:
    model, _ = trained(method)
    state = lk.extract(model)
    lk.save(model, tmp_path, form="native")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lorakit"]["why_not_peft"] == [
        "lorakit's own form was asked for"
    ]
    assert_equal(lk.read(tmp_path), state)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_files_of_peft_hold_the_plain_form(method: Any, tmp_path: Path) -> None:
    model, _ = trained(method)
    assert why_not_peft(lk.extract(model)) == []
    lk.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["init_lora_weights"]) == ("LORA", True)
    assert not any("start" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert_equal(lk.read(tmp_path), lk.extract(model).plain())
    stock = Mlp()
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if "lorakit" not in k})
    lk.load(stock, tmp_path)
    x = torch.randn(5, 6)
    model.eval()
    with torch.no_grad():
        assert torch.equal(stock.eval()(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_stacks_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, _ = trained(lk.LoRA(r=2, alpha=3, init="pissa"), Host(Experts()), ["up"])
    x = torch.randn(2, 5, 6)
    y = model(x)
    lk.save(model, tmp_path)
    lk.detach(model)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(theirs(x), y, rtol=0, atol=1e-5)


def test_an_adapter_without_a_start_is_native_only_when_asked_for(tmp_path: Path) -> None:
    model, _ = trained(lk.LoRA(r=2))
    for form, kind in (("auto", "LORA"), ("native", "LORAKIT")):
        lk.save(lk.extract(model), tmp_path / form, form=form)  # type: ignore[arg-type]
        assert json.loads((tmp_path / form / "adapter_config.json").read_text())["peft_type"] == kind
        assert_equal(lk.read(tmp_path / form), lk.extract(model))
    with pytest.raises(AdapterFileError, match="form is 'auto' or 'native'; got 'peft'"):
        lk.save(model, tmp_path / "other", form="peft")  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()


# ---- PEFT's two files -----------------------------------------------------------------------------------------------
def as_peft_saves(state: AdapterState, folder: Path, init: Any) -> Path:
    """The factors alone, as PEFT saves them: the start is in nobody's file."""
    methods = {
        path: dataclasses.replace(method, init="kaiming")
        for path, method in state.spec.methods.items()  # type: ignore[type-var]
    }
    tensors = {
        path: {name: t for name, t in group.items() if not name.startswith("start")}
        for path, group in state.tensors.items()
    }
    write(AdapterState(dataclasses.replace(state.spec, methods=methods), tensors), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}))
    return folder


def read_two(folder: Path, init: Any = "pissa", before_init: Any = True) -> AdapterState:
    model, before = trained(PISSA)
    as_peft_saves(lk.extract(model), folder / "trained", init)
    as_peft_saves(before, folder / "start", before_init)
    return lk.read(folder / "trained", initial=folder / "start", prefer="config")


@pytest.mark.parametrize(
    ("init", "name"),
    [("pissa", "pissa"), ("pissa_niter_4", "pissa_niter_4"), ("olora", "olora"), ("lora_ga", "lora_ga"),
     ("corda", "given"), (True, "given")],
)  # fmt: skip
def test_with_the_start_the_change_is_known(init: Any, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    from lorakit.io import adapter_directory

    own = adapter_directory._consistent
    monkeypatch.setattr(adapter_directory, "_consistent", lambda d, w, _: own(d, w, "config"))
    state = read_two(tmp_path, init)
    model, _ = trained(PISSA)
    expected = lk.extract(model)
    for path, method in state.spec.methods.items():
        assert method == dataclasses.replace(expected.spec.methods[path], init=name)  # type: ignore[type-var]
        for key, tensor in expected.tensors[path].items():
            assert torch.equal(state.tensors[path][key], tensor)
    assert "init_lora_weights" not in state.spec.info.get("peft", {})
    again = lk.extract(model).plain()
    assert torch.equal(state.plain().tensors["fc1"]["lora_A"], again.tensors["fc1"]["lora_A"])


def test_without_it_the_file_is_refused(tmp_path: Path) -> None:
    model, _ = trained(PISSA)
    folder = as_peft_saves(lk.extract(model), tmp_path / "trained", "pissa")
    with pytest.raises(
        AdapterFileError, match=r"init_lora_weights='pissa'.*changed the base.*Convert it.*initial="
    ):
        lk.read(folder, prefer="config")


def test_loftq_has_another_base_and_stays_refused(tmp_path: Path) -> None:
    model, before = trained(PISSA)
    folder = as_peft_saves(lk.extract(model), tmp_path / "trained", "loftq")
    as_peft_saves(before, tmp_path / "start", True)
    with pytest.raises(AdapterFileError, match="loftq"):
        lk.read(folder, initial=tmp_path / "start", prefer="config")


def test_our_own_form_needs_no_start(tmp_path: Path) -> None:
    model, before = trained(PISSA)
    lk.save(model, tmp_path / "ours", form="native")
    lk.save(before, tmp_path / "start", form="native")
    with pytest.raises(AdapterFileError, match=r"own form, which holds its start: pass no initial"):
        lk.read(tmp_path / "ours", initial=tmp_path / "start")


@pytest.mark.parametrize(
    ("other", "targets", "message"),
    [
        (lk.LoRA(r=2, alpha=3), ["fc1"], r"adapt different layers: fc2"),
        (lk.LoRA(r=2, alpha=3), ["fc1", "fc2"], r"'fc2' it has LoRA\(r=2.*not LoRA\(r=4"),
        (lk.LoRA(r=2, alpha=4, rank_pattern={"fc2": 4}), ["fc1", "fc2"], "'fc1'.*alpha=4"),
        (lk.LoRA(r=2, alpha=3, scaling="rslora", rank_pattern={"fc2": 4}), ["fc1", "fc2"], "'fc1'.*rslora"),
    ],
    ids=["targets", "rank", "alpha", "scaling"],
)
def test_two_files_that_do_not_belong_together(other: lk.LoRA, targets: list[str], message: str) -> None:
    model, _ = trained(dataclasses.replace(PISSA, init="kaiming"))
    _, before = trained(other, targets=targets)
    with pytest.raises(AdapterFileError, match=message):
        with_start(lk.extract(model), before, "pissa")
