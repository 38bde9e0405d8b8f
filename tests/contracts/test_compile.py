"""``torch.compile``: one graph for the default route, other routes after switching, and ``use`` with graph breaks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lorakit as lk
from tests.contracts.pairs import Case, askable, close, pairs

pytestmark = pytest.mark.compiled

# Each compilation costs some tenths of a second: every method once or twice, every way of binding once.
some = pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("lora", "linear"),
        ("lora", "mha-out"),
        ("lora", "linear-nf4"),
        ("dora", "linear-int8"),
        ("rslora", "hfconv1d-nf4"),
        ("houlsby", "linear"),
        ("pfeiffer", "ffn"),
        ("parallel", "ffn-span"),
        ("parallel", "ffn-tuple"),
        ("lora", "linear-slice"),
        ("dora", "linear-slice-interleaved"),
        ("lorabias", "hfconv1d-slice"),
        ("lora", "mha-slice"),
        ("full", "linear-slice-uneven"),
        ("lorabias", "hfconv1d"),
        ("rslora", "conv2d-groups"),
        ("dora", "embedding"),
        ("dora", "linear"),
        ("dora_rslora", "conv2d"),
        ("pissa", "linear"),
        ("olora", "embedding"),
        ("dora_pissa", "conv2d-groups"),
        ("full", "linear"),
        ("full", "experts"),
        ("bitfit", "linear"),
        ("token_rows", "embedding"),
        ("adalora", "linear"),
        ("adalora", "conv2d-groups"),
        ("dylora", "linear"),
        ("lora_fa", "linear"),
        ("ia3", "conv2d"),
        ("ia3_input", "linear"),
        ("vera", "linear"),
        ("dora_vera", "conv2d-groups"),
        ("loha", "linear"),
        ("loha_tucker", "conv2d"),
        ("lokr", "linear"),
        ("lokr_tucker", "conv2d"),
        ("lora_c", "conv3d-groups"),
        ("prefix", "attention-llama"),
        ("prefix_mlp", "attention-gpt2"),
        ("prompt", "model-gpt2"),
        ("prompt_pooled", "model-bert"),
    ],
    ids=lambda value: value,
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two_adapters(setting: str, kind: str) -> Case:
    case = Case(kind)
    case.attach(setting, "a")
    case.attach_partner(setting, "b")
    return case


@some
def test_the_default_route_compiles_to_one_graph_and_switches(setting: str, kind: str) -> None:
    case = two_adapters(setting, kind)
    compiled = torch.compile(case.model, backend="eager", fullgraph=True)
    for route in ("a", "b", None, askable({"a": 0.7, "b": 0.3}, setting), "a"):
        lk.set_active(case.model, route)
        with torch.no_grad():
            close(compiled(case.x), case.model(case.x), 1e-12)
    with torch.no_grad():
        a = compiled(case.x)
        lk.set_active(case.model, "b")
        assert not torch.allclose(compiled(case.x), a)


@some
def test_gradients_through_a_compiled_model(setting: str, kind: str) -> None:
    case = two_adapters(setting, kind)
    compiled = torch.compile(case.model, backend="eager", fullgraph=True)
    y = case.model(case.x)
    G = case.cotangent(y)
    parameters = list(case.trained("a").values())
    expected = torch.autograd.grad((y * G).sum(), parameters)
    got = torch.autograd.grad((compiled(case.x) * G).sum(), parameters)
    for one, other in zip(got, expected, strict=True):
        close(one, other, 1e-11)


@pytest.mark.parametrize(
    ("setting", "kind"), [("lora", "linear"), ("dora", "conv2d"), ("full", "experts")], ids=str
)
def test_use_works_with_a_compiled_model(setting: str, kind: str) -> None:
    case = two_adapters(setting, kind)
    compiled = torch.compile(case.model, backend="eager")
    with torch.no_grad():
        compiled(case.x)
        for route in ("b", None, {"a": 0.7, "b": 0.3}, "a"):
            with lk.use(case.model, route):
                close(compiled(case.x), case.model(case.x), 1e-12)
        with lk.use(case.model, "b"):
            b = case.model(case.x)
            close(compiled(case.x), b, 1e-12)
        assert not torch.allclose(compiled(case.x), b)


@pytest.mark.parametrize(("setting", "kind"), [("lora", "linear"), ("full", "linear")], ids=str)
def test_a_merge_after_compiling_is_seen(setting: str, kind: str) -> None:
    case = two_adapters(setting, kind)
    compiled = torch.compile(case.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        a = compiled(case.x)
        lk.merge(case.model, "b")
        close(compiled(case.x), case.expected({"b": 1.0}), 1e-12)
        lk.unmerge(case.model)
        close(compiled(case.x), a, 1e-12)
        lk.detach(case.model)
        close(compiled(case.x), case.stock(case.x), 1e-12)


def test_dropout_in_a_compiled_model_drops_in_training_only() -> None:
    case = Case("linear")
    lk.attach(case.model, lk.LoRA(r=2, dropout=0.5), ["layer"], name="a")
    with torch.no_grad():
        case.parameters("a")["lora_B"].normal_(generator=case.draw)
    compiled = torch.compile(case.model, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    assert not torch.allclose(compiled(case.x), compiled(case.x))
    case.model.eval()
    assert torch.equal(compiled(case.x), compiled(case.x))
    close(compiled(case.x), case.model(case.x), 1e-12)


@pairs(settings=("lora",), kinds=("linear",))
def test_rows_in_a_compiled_model_are_right(setting: str, kind: str) -> None:
    case = two_adapters(setting, kind)
    compiled = torch.compile(case.model, backend="eager")
    with torch.no_grad(), lk.use(case.model, rows=["a", "b", None, "a"]):
        close(compiled(case.x), case.model(case.x), 1e-12)
