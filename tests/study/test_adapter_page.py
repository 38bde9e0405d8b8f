"""The page about adapters: whole, self-contained, and with the numbers that the analysis has."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import torch

import lorakit as lk
from lorakit.adapters import analyse, beside
from lorakit.study.adapter_page import adapter_page
from tests.adapters.states import linear, random_state

VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Checks that what is opened is closed, and collects text and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def model(layers: int = 3, seed: int = 0, r: int = 3, base: str | None = None) -> lk.AdapterState:
    shapes = {f"layers.{n}.{leaf}": linear(12, 10) for n in range(layers) for leaf in ("attn.q", "mlp.up")}
    return random_state(dict.fromkeys(shapes, lk.LoRA(r=r, alpha=6)), shapes, seed=seed, base=base)


def test_one_adapter() -> None:
    state = model()
    found = analyse(state)
    page = adapter_page({"sql": found})
    read = Reader(page)
    text = " ".join(read.text)
    for words in (
        "sql",
        "Where the change is",
        "How many directions",
        "Ranks that hold 90%",
        f"{state.numel:,}",
    ):
        assert words in text
    assert "Beside the base" not in text
    titles = {value for name, value in read.attributes if name == "title"}
    norm = found.targets["layers.1.attn.q"].spectrum.frobenius  # type: ignore[union-attr]
    assert f"q, 1: {norm:#.3g}".rstrip(".") in titles
    ranks = found.ranks
    assert ranks is not None
    assert f"have {ranks.after:,} numbers" in text
    assert page.count("<polyline") == len(state.spec.methods)


def test_nothing_is_loaded() -> None:
    page = adapter_page({"a": analyse(model()), "b": analyse(model(seed=1))})
    read = Reader(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name in ("src", "href") or name.startswith("on")]
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_names_are_escaped() -> None:
    shapes = {"<b>q": linear()}
    state = random_state({"<b>q": lk.LoRA(r=2)}, shapes, base='"><script>alert(1)</script>')
    page = adapter_page({"<i>me</i>": analyse(state)})
    assert not {"b", "i", "script"} & set(Reader(page).tags)


def test_several_adapters() -> None:
    a, b = model(seed=1), model(seed=2, r=5)
    found = beside(a, b)
    page = adapter_page({"a": analyse(a), "b": analyse(b)}, {("a", "b"): found})
    text = " ".join(Reader(page).text)
    assert "2 adapters" in text
    assert "a and b" in text
    assert f"{found.cosine:.4f}" in text
    assert "φ(3, 5)" in text
    squares = re.findall(r'<g class="cells"[^>]*>(.*?)</g>', page)
    assert [len(re.findall("<rect", one)) for one in squares] == [15, 15, 15]
    phi = found.inputs["layers.0.attn.q"].phi
    assert len(found.inputs) == 6
    mean = float(torch.stack([s.phi for s in found.inputs.values()]).mean(0)[-1, -1])
    assert phi.shape == (3, 5)
    assert f"{mean:.3f}" in text


def test_adapters_with_nothing_in_common() -> None:
    a, b = model(), random_state({"k": lk.LoRA(r=2)}, {"k": linear()})
    page = adapter_page({"a": analyse(a), "b": analyse(b)}, {("a", "b"): beside(a, b)})
    assert "No target has directions of both" in " ".join(Reader(page).text)


def test_beside_the_base() -> None:
    state = model()
    W = {path: torch.randn(12, 10, dtype=torch.float64) for path in state.spec.methods}
    text = " ".join(Reader(adapter_page({"a": analyse(state, base=W)})).text)
    assert "Beside the base weights" in text
    assert "Amplification" in text
    assert "and its base weights" in text


def test_a_base_that_is_zero_somewhere() -> None:
    state = model()
    W = {path: torch.zeros(12, 10, dtype=torch.float64) for path in state.spec.methods}
    W["layers.0.attn.q"] = torch.randn(12, 10, dtype=torch.float64)
    assert "∞" in " ".join(Reader(adapter_page({"a": analyse(state, base=W)})).text)


def test_adapters_without_spectra_or_with_damage() -> None:
    page = adapter_page({"a": analyse(random_state({"q": lk.LoHa(r=2)}, {"q": linear()}))})
    assert "No target has factors" in " ".join(Reader(page).text)
    state = model()
    broken = {path: dict(group) for path, group in state.tensors.items()}
    broken["layers.0.attn.q"]["lora_A"] = torch.full((3, 10), torch.nan, dtype=torch.float64)
    page = adapter_page({"a": analyse(lk.AdapterState(state.spec, broken))})
    assert "1 tensors hold a NaN" in " ".join(Reader(page).text)


def test_a_fresh_adapter_a_single_direction_and_no_layers() -> None:
    state = model(r=1)
    fresh = {p: {n: t * (n != "lora_B") for n, t in group.items()} for p, group in state.tensors.items()}
    Reader(adapter_page({"fresh": analyse(lk.AdapterState(state.spec, fresh))}))
    Reader(adapter_page({"one": analyse(state)}))
    Reader(adapter_page({"flat": analyse(random_state({"q": lk.LoRA(r=2)}, {"q": linear()}))}))


def test_many_layers_have_colours_without_numbers() -> None:
    page = adapter_page({"deep": analyse(model(40))})
    cells = re.findall(r"<td[^>]*--v[^>]*>([^<]*)</td>", page)
    assert len(cells) == 3 * 2 * 40
    assert set(cells) == {""}


def test_rank_pattern_is_yaml() -> None:
    import yaml

    state = model(2)
    tensors = {p: dict(group) for p, group in state.tensors.items()}
    tensors["layers.1.attn.q"]["lora_A"] = tensors["layers.1.attn.q"]["lora_A"] * torch.tensor(
        [[1.0], [0], [0]]
    )
    found = analyse(lk.AdapterState(state.spec, tensors), energy=1.0)
    page = Reader(adapter_page({"a": found}))
    text = next(t for t in page.text if t.startswith("adapter:"))
    settings = yaml.safe_load(text)["adapter"]
    lora = lk.LoRA(r=settings["r"], rank_pattern=settings["rank_pattern"])
    assert {p: lora.for_path(p).r for p in state.spec.methods} == dict(found.ranks.targets)  # type: ignore[union-attr]
