"""Pictures with matplotlib: what is drawn are the numbers of the analysis."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorakit as lk
from lorakit.adapters import analyse, similarity
from lorakit.errors import ConfigError, MissingDependencyError
from lorakit.study.pictures import by_layer_picture, energy_picture, similarity_picture
from tests.adapters.states import linear, random_state


def model(seed: int = 0, r: int = 3) -> lk.AdapterState:
    shapes = {f"layers.{n}.{leaf}": linear(12, 10) for n in range(4) for leaf in ("attn.q", "mlp.up")}
    return random_state(dict.fromkeys(shapes, lk.LoRA(r=r, alpha=6)), shapes, seed=seed)


def test_by_layer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = analyse(model())
    figure = by_layer_picture(found, lambda t: t.spectrum and t.spectrum.frobenius, label="norm")
    (axes,) = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert set(lines) == {"q", "up"}
    assert lines["q"] == pytest.approx([found.norms()["q"][f"layers.{n}"] for n in range(4)])
    figure.savefig(tmp_path / "norms.png")
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="nothing to draw"):
        by_layer_picture(found, lambda t: None, label="norm")


def test_energy(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = analyse(model(), energy=0.8)
    figure = energy_picture(found, title="energy")
    assert [axes.get_title() for axes in figure.axes] == ["q", "up"]
    *lines, aim = figure.axes[0].get_lines()
    assert len(lines) == 4
    spectrum = found.targets["layers.0.attn.q"].spectrum
    assert spectrum is not None
    assert list(lines[0].get_ydata()) == pytest.approx(spectrum.energy.tolist())
    assert list(aim.get_ydata()) == [0.8, 0.8]
    figure.savefig(tmp_path / "energy.png")
    with pytest.raises(ConfigError, match="nothing to draw"):
        energy_picture(analyse(random_state({"q": lk.LoHa(r=2)}, {"q": linear()})))


def test_similarity(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    a, b = model(1), model(2, r=5)
    found = {of: similarity(a, b, "layers.0.attn.q", of) for of in ("A", "B")}  # type: ignore[arg-type]
    figure = similarity_picture(found, across="j", down="i")
    image = figure.axes[0].get_images()[0]
    assert image.get_array().tolist() == found["A"].phi.tolist()  # type: ignore[union-attr]
    figure.savefig(tmp_path / "phi.png")
    with pytest.raises(ConfigError, match="no similarity"):
        similarity_picture({}, across="j", down="i")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"lorakit\[plots\]"):
        energy_picture(analyse(model()))
