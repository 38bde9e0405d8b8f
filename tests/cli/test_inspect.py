"""``lorakit inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit import adapters
from lorakit.io.checkpoint import Checkpoint
from tests.cli.conftest import Lorakit, Trained


def test_table(lorakit: Lorakit, trained: Trained) -> None:
    outcome = lorakit("inspect", trained.adapter)
    assert outcome.code == 0
    for word in (
        "q_proj",
        "down_proj",
        "lora",
        "float32",
        "eff. rank",
        f"{lk.read(trained.adapter).numel:,}",
    ):
        assert word in outcome.out


def test_numbers(lorakit: Lorakit, tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5), "norm": nn.LayerNorm(5)})
    lk.attach(
        model, {"a": lk.LoRA(r=2, alpha=3), "b": lk.LoRA(r=2, alpha=3), "norm": lk.FullFineTuning()}, seed=0
    )
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    state = lk.extract(model)
    lk.save(model, tmp_path / "adapter")
    result = json.loads(lorakit("inspect", tmp_path / "adapter", "--json").out)
    assert result["parameters"] == state.numel
    assert result["bytes"] == 4 * state.numel
    assert result["not_finite"] == []
    groups = {group["target"]: group for group in result["groups"]}
    dense = 1.5 * state.tensors["a"]["lora_B"] @ state.tensors["a"]["lora_A"]
    assert groups["a"] == {
        **groups["a"],
        "method": "lora",
        "size": "5 x 6",
        "sites": 1,
        "r": 2,
        "alpha": 3,
        "scale": 1.5,
        "parameters": 22,
        "bytes": 88,
        "dtype": "float32",
        "norm": pytest.approx(dense.norm().item(), rel=1e-5),
        "top": pytest.approx(torch.linalg.matrix_norm(dense, 2).item(), rel=1e-5),
    }
    assert 1 < groups["a"]["effective_rank"] <= 2
    full = [group for group in result["groups"] if group["method"] == "full"]
    assert full
    assert all(group["r"] is None and group["norm"] is None for group in full)


def test_not_a_number_is_pointed_out(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    state = lk.read(trained.adapter)
    path = next(iter(state.tensors))
    broken = {p: dict(group) for p, group in state.tensors.items()}
    broken[path]["lora_A"] = broken[path]["lora_A"].clone()
    broken[path]["lora_A"][0, 0] = float("nan")
    lk.save(lk.AdapterState(state.spec, broken), tmp_path / "broken")
    outcome = lorakit("inspect", tmp_path / "broken")
    assert "1 tensors hold a NaN" in outcome.out
    assert json.loads(lorakit("inspect", tmp_path / "broken", "--json").out)["not_finite"] == [
        f"{path}:lora_A"
    ]


def test_mistakes(lorakit: Lorakit, trained: Trained, tmp_path: Path) -> None:
    assert "There is no adapter" in lorakit("inspect", tmp_path / "x").err
    assert "holds no adapter" in lorakit("inspect", trained.model).err


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base checkpoint, and two adapters of it."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    save_file(
        {name: t.detach().clone() for name, t in model.named_parameters()}, tmp_path / "model.safetensors"
    )
    folders = []
    for n, r in enumerate((2, 4)):
        lk.attach(model, lk.LoRA(r=r, alpha=3), seed=n)
        with torch.no_grad():
            for parameter in lk.trainable(model).values():
                parameter.normal_(generator=torch.Generator().manual_seed(n))
        lk.save(model, tmp_path / f"run{n}" / "adapter")
        lk.detach(model)
        folders.append(tmp_path / f"run{n}" / "adapter")
    return tmp_path, folders[0], folders[1]


def test_every_target_as_json(lorakit: Lorakit, two: tuple[Path, Path, Path]) -> None:
    _, first, _ = two
    found = json.loads(lorakit("inspect", first, "--json", "--energy", "0.5").out)
    analysis = adapters.analyse(lk.read(first), energy=0.5)
    assert set(found["targets"]) == {"0", "1"}
    one = found["targets"]["0"]
    spectrum = analysis.targets["0"].spectrum
    assert spectrum is not None
    assert one["singular_values"] == spectrum.values.tolist()
    assert one["energy_rank"] == spectrum.energy_rank(0.5)
    assert one["stable_rank"] == spectrum.stable_rank
    assert analysis.ranks is not None
    assert found["ranks"] == {
        "energy": 0.5,
        "r": analysis.ranks.r,
        "rank_pattern": analysis.ranks.rank_pattern,
        "before": analysis.ranks.before,
        "after": analysis.ranks.after,
    }
    assert "amplification" not in one


def test_beside_the_base(lorakit: Lorakit, two: tuple[Path, Path, Path]) -> None:
    base, first, _ = two
    outcome = lorakit("inspect", first, "--base", base)
    assert "amplified" in outcome.out
    found = json.loads(lorakit("inspect", first, "--base", base, "--json").out)
    W = Checkpoint(base)["0.weight"]
    expected = adapters.amplification(lk.read(first), "0", W)
    one = found["targets"]["0"]
    assert one["amplification"]["factor"] == expected.factor
    assert one["relative"] == expected.relative
    assert one["amplification"]["random"] == expected.random


def test_base_of_another_model(lorakit: Lorakit, two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    _, first, _ = two
    (tmp_path / "other").mkdir()
    save_file({"x.weight": torch.zeros(3, 3)}, tmp_path / "other" / "model.safetensors")
    outcome = lorakit("inspect", first, "--base", tmp_path / "other")
    assert outcome.code == 2
    assert "holds no weight that the adapter changes: for 0, no tensor '0.weight'" in outcome.err
    save_file({"0.weight": torch.zeros(10, 12)}, tmp_path / "other" / "model.safetensors")
    outcome = lorakit("inspect", first, "--base", tmp_path / "other")
    assert outcome.code == 0
    assert "Not beside the base: 1 targets, such as 1 (no tensor '1.weight')" in outcome.out
    found = json.loads(lorakit("inspect", first, "--base", tmp_path / "other", "--json").out)
    assert found["targets"]["0"]["amplification"]["factor"] is None  # infinite: JSON has no word for it


def test_two_adapters(lorakit: Lorakit, two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, first, second = two
    outcome = lorakit("inspect", first, second, "--html", tmp_path / "page.html")
    assert outcome.code == 0
    for words in ("In common", "run0/adapter", "run1/adapter", "phi(1, 1) in", "page.html"):
        assert words in outcome.out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "run0/adapter and run1/adapter" in page
    found = json.loads(lorakit("inspect", first, second, "--json").out)
    assert [one["path"] for one in found["adapters"]] == [str(first), str(second)]
    (pair,) = found["pairs"]
    beside = adapters.beside(lk.read(first), lk.read(second))
    assert pair["cosine"] == beside.cosine
    assert (pair["first"], pair["second"], pair["targets"]) == ("run0/adapter", "run1/adapter", 2)
    mean = torch.stack([s.phi for s in beside.inputs.values()]).mean(0)
    assert pair["inputs"]["phi"] == mean.tolist()
    assert pair["inputs"]["random_all"] == pytest.approx((4 / 12 + 4 / 10) / 2)


def test_adapters_of_different_bases_are_shown_and_not_compared(
    lorakit: Lorakit, trained: Trained, two: tuple[Path, Path, Path]
) -> None:
    _, first, _ = two
    state = lk.read(first)
    other = first.parent / "other"
    lk.save(
        lk.AdapterState(lk.AdapterSpec(state.spec.methods, state.spec.shapes, "x/other"), state.tensors),
        other,
    )
    outcome = lorakit("inspect", trained.adapter, other)
    assert outcome.code == 0
    assert "were not compared: The adapters were made for different base models" in outcome.out
    assert "In common" not in outcome.out
    outcome = lorakit("inspect", first, first)
    assert outcome.code == 2
    assert "named twice" in outcome.err


def test_a_loralib_file(lorakit: Lorakit, tmp_path: Path) -> None:
    tensors = {
        f"layer.{n}.query.lora_{x}": torch.randn(4, 9) if x == "A" else torch.randn(9, 4)
        for n in range(3)
        for x in "AB"
    }
    torch.save(tensors, tmp_path / "lora.bin")
    outcome = lorakit("inspect", tmp_path / "lora.bin", "--alpha", "8", "--allow-pickle")
    assert outcome.code == 0
    assert "query" in outcome.out
    refused = lorakit("inspect", tmp_path / "lora.bin", "--alpha", "8")
    assert refused.code == 2
    assert "--allow-pickle" in refused.err
    assert "--alpha NUMBER" in lorakit("inspect", tmp_path / "lora.bin", "--allow-pickle").err


def test_methods_without_factors(lorakit: Lorakit, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    lk.attach(model, lk.LoHa(r=2), seed=0)
    with torch.no_grad():
        for parameter in lk.trainable(model).values():
            parameter.normal_()
    lk.save(model, tmp_path / "loha")
    plain = json.loads(lorakit("inspect", tmp_path / "loha", "--json").out)
    assert plain["ranks"] is None
    dense = json.loads(lorakit("inspect", tmp_path / "loha", "--dense", "--json").out)
    assert len(dense["targets"]["0"]["singular_values"]) == 5
    assert lorakit("inspect", tmp_path / "loha", "--energy", "2", "--dense").code == 2
