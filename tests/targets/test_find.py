"""Choosing targets: what is found, what is refused, and what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import lorakit as lk
from lorakit.errors import ConfigError, TargetError, UnmatchedTargetError, UnsupportedTargetError
from lorakit.targets import candidates, find
from lorakit.targets.recognise import layer_target, parameter_target
from tests.contracts.kinds import Experts, Host


class Block(nn.Module):
    """Named like a block of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.attn = nn.MultiheadAttention(4, 2)
        self.experts = Experts()
        self.conv = nn.Conv1d(4, 4, 3)


class Model(nn.Module):
    """An embedding and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(Block() for _ in range(2))


MODEL = Model()
LLAMA = LlamaConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_labels=3,
    pad_token_id=0,
)


def paths(*args: Any, **kwargs: Any) -> list[str]:
    return [t.path for t in find(MODEL, *args, **kwargs)]


def both(*names: str) -> list[str]:
    return [f"layers.{i}.{name}" for i in range(2) for name in names]


# ---- what is found ---------------------------------------------------------------------------------------
def test_all_linear_takes_linear_layers_and_attention_projections() -> None:
    assert paths() == both("q_proj", "v_proj", "attn.in_proj_weight", "attn.out_proj")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], both("q_proj")),
        (["v_proj", "q_proj"], both("q_proj", "v_proj")),
        (["layers.1.q_proj"], ["layers.1.q_proj"]),
        (["embed", "conv"], ["embed", *both("conv")]),
        (["attn"], both("attn.in_proj_weight", "attn.out_proj")),
        (["out_proj"], both("attn.out_proj")),
        (["up"], both("experts.up")),
        (["q_proj.weight"], both("q_proj.weight")),
        (["q_proj", "layers.0.q_proj"], both("q_proj")),
        (r".*\.0\.(q|v)_proj", ["layers.0.q_proj", "layers.0.v_proj"]),
        (r".*experts\.up", both("experts.up")),
        (lambda path, module: isinstance(module, nn.Conv1d) and "1" in path, ["layers.1.conv"]),
    ],
    ids=[
        "end",
        "two",
        "path",
        "kinds",
        "attention",
        "projection",
        "bare",
        "parameter",
        "twice",
        "regex",
        "regexbare",
        "callable",
    ],
)
def test_what_is_named_is_found_in_the_order_of_the_model(targets: Any, expected: list[str]) -> None:
    assert paths(targets) == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-bias", [n for n, _ in MODEL.named_parameters() if n.endswith("bias")]),
        ("all-parameters", [n for n, _ in MODEL.named_parameters()]),
        (["norm"], both("norm.weight", "norm.bias")),
        (["layers.1.q_proj", "embed"], ["embed.weight", "layers.1.q_proj.weight", "layers.1.q_proj.bias"]),
        (["norm.bias"], both("norm.bias")),
        (r".*\.1\.norm\..*", ["layers.1.norm.weight", "layers.1.norm.bias"]),
        (r"layers\.1\.norm", ["layers.1.norm.weight", "layers.1.norm.bias"]),
        (lambda path, module: isinstance(module, nn.LayerNorm) and path.endswith("bias"), both("norm.bias")),
    ],
    ids=["bias", "all", "module", "order", "name", "regex", "regexmodule", "callable"],
)
def test_whole_parameters(targets: Any, expected: list[str]) -> None:
    assert sorted(paths(targets, adapts="parameter")) == sorted(expected)
    assert {t.binding for t in find(MODEL, targets, adapts="parameter")} == {"parameter"}


def test_a_model_that_is_itself_a_layer() -> None:
    (target,) = find(nn.Linear(3, 2))
    assert target.path == ""
    assert [t.path for t in find(nn.Linear(3, 2), ["weight"], adapts="parameter")] == ["weight"]


def test_a_layer_that_stands_in_two_places_is_found_once() -> None:
    shared = nn.Linear(3, 3)
    assert [t.path for t in find(nn.Sequential(shared, nn.ReLU(), shared))] == ["0"]


@pytest.mark.parametrize("kind", [LlamaForCausalLM, LlamaForSequenceClassification])
def test_heads_are_left_out_unless_they_are_named(kind: type) -> None:
    model = kind(LLAMA)
    head = "lm_head" if kind is LlamaForCausalLM else "score"
    chosen = [t.path for t in find(model)]
    assert len(chosen) == 2 * 7
    assert head not in chosen
    assert [t.path for t in find(model, [head])] == [head]


def test_a_head_without_a_base_model_prefix_is_left_out() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 5)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    assert [t.path for t in find(Plain())] == ["body"]


def test_adapters_are_no_targets() -> None:
    model = Model()
    before = (
        [t.path for t in find(model)],
        [t.path for t in find(model, "all-parameters", adapts="parameter")],
    )
    lk.attach(model, lk.LoRA(r=2))
    assert (
        [t.path for t in find(model)],
        [t.path for t in find(model, "all-parameters", adapts="parameter")],
    ) == before


# ---- exclude ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (["v_proj", "attn"], both("q_proj")),
        (
            ["layers.0"],
            ["layers.1.q_proj", "layers.1.v_proj", "layers.1.attn.in_proj_weight", "layers.1.attn.out_proj"],
        ),
        (r".*attn.*|.*v_proj", both("q_proj")),
        (lambda path, module: not path.endswith("q_proj"), both("q_proj")),
    ],
    ids=["names", "part", "regex", "callable"],
)
def test_exclude_takes_away(exclude: Any, expected: list[str]) -> None:
    assert paths(exclude=exclude) == expected


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["v_porj"], "exclude entry 'v_porj'.*Did you mean 'v_proj'"),
        (["v_proj", "zzz"], "exclude entry 'zzz'"),
        (["conv"], "exclude entry 'conv'"),
        ("v_proj", r"give a list: \['v_proj'\]"),
        (lambda path, module: False, "excludes none of the 8"),
        (".*", "leaves none of the 8"),
    ],
    ids=["typo", "one", "notchosen", "regex", "callable", "all"],
)
def test_an_exclusion_that_does_nothing_or_everything_is_an_error(exclude: Any, message: str) -> None:
    with pytest.raises(UnmatchedTargetError, match=message):
        find(MODEL, exclude=exclude)


# ---- what matches nothing --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_porj"], "target 'q_porj' matches nothing.*Did you mean 'q_proj'"),
        (["q_proj", "zzz"], "target 'zzz'.*It has: .*q_proj"),
        ("q_proj", r"give a list: \['q_proj'\]"),
        ("all_linear", "Did you mean 'all-linear'.*Presets: all-linear, all-conv, all-parameters, all-bias"),
        (lambda path, module: False, "chose none of the"),
        ([], "names nothing"),
        ([3], "must be strings; got 3"),
    ],
    ids=["typo", "one", "regex", "preset", "callable", "empty", "number"],
)
@pytest.mark.parametrize("adapts", ["layer", "parameter"])
def test_what_matches_nothing_is_an_error_with_a_hint(targets: Any, message: str, adapts: Any) -> None:
    with pytest.raises(TargetError, match=message):
        find(MODEL, targets, adapts=adapts)


def test_a_broken_expression() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        find(MODEL, "q_(proj")


def test_a_preset_for_layers_does_not_choose_parameters() -> None:
    with pytest.raises(UnmatchedTargetError, match="all-parameters"):
        find(MODEL, "all-linear", adapts="parameter")


@pytest.mark.parametrize(
    ("preset", "adapts"),
    [("all-linear", "layer"), ("all-bias", "parameter"), ("all-parameters", "parameter")],
)
def test_a_preset_that_finds_nothing(preset: str, adapts: Any) -> None:
    with pytest.raises(UnmatchedTargetError, match=preset):
        find(nn.Sequential(nn.ReLU()), preset, adapts=adapts)


def test_all_conv_takes_the_convolutions_and_no_transposed_ones() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 2, 3), nn.Conv3d(2, 2, 1), nn.ConvTranspose2d(2, 2, 3), nn.Linear(2, 2)
    )
    assert [t.path for t in find(model, "all-conv")] == ["0", "1"]
    with pytest.raises(UnmatchedTargetError, match=r"'all-conv' found no convolution.*it has: layer"):
        find(Host(nn.Linear(3, 3)), "all-conv")
    with pytest.raises(UnmatchedTargetError, match="all-parameters"):
        find(model, "all-conv", adapts="parameter")


def test_all_linear_without_linear_layers_says_what_there_is() -> None:
    with pytest.raises(UnmatchedTargetError, match="it has: layer"):
        find(Host(nn.Conv1d(3, 3, 3)))


# ---- what cannot be adapted ------------------------------------------------------------------------------
def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))


UNSUPPORTED = {
    "transposed": (lambda: nn.ConvTranspose2d(3, 3, 3), "transposed convolution"),
    "bag": (lambda: nn.EmbeddingBag(5, 3), "EmbeddingBag is not one matrix"),
    "bilinear": (lambda: nn.Bilinear(3, 3, 2), "Bilinear is not one matrix"),
    "max_norm": (lambda: nn.Embedding(5, 3, max_norm=1.0), "max_norm.*in place"),
    "parametrized": (parametrized, "parametrized by something else"),
    "spectral": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 3)),
        "parametrized by something else",
    ),
    "norm": (lambda: nn.LayerNorm(3), "holds no matrix.*FullFineTuning.*weight, bias"),
    "activation": (lambda: nn.ReLU(), "ReLU, which holds no matrix"),
    "container": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
        "Sequential, not a layer; inside it are: 0, 1",
    ),
    "block": (Block, "Block, not a layer; inside it are: .*q_proj"),
}


@pytest.mark.parametrize(("build", "reason"), list(UNSUPPORTED.values()), ids=list(UNSUPPORTED))
def test_an_unsupported_layer_that_is_named_gives_the_reason(build: Any, reason: str) -> None:
    with pytest.raises(UnsupportedTargetError, match=f"'layer' .*{reason}"):
        find(Host(build()), ["layer"])


def test_integer_weights_are_refused_with_their_dtype() -> None:
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedTargetError, match=r"torch\.int8"):
        find(Host(layer), ["layer"])


def test_a_weight_that_is_no_parameter_is_refused() -> None:
    layer = nn.Linear(3, 3)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    with pytest.raises(UnsupportedTargetError, match="not an ordinary parameter"):
        find(Host(layer), ["layer"])


def test_an_unsupported_layer_can_be_excluded() -> None:
    model = nn.ModuleDict({"odd": parametrized(), "even": nn.Linear(3, 3)})
    with pytest.raises(UnsupportedTargetError, match="'odd'"):
        find(model)
    assert [t.path for t in find(model, exclude=["odd"])] == ["even"]
    assert [
        t.path for t in find(model, exclude=lambda path, module: isinstance(module, type(model.odd)))
    ] == ["even"]


# ---- the pieces ------------------------------------------------------------------------------------------
def test_candidates_are_targets_or_reasons() -> None:
    found = candidates(nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.EmbeddingBag(5, 3), "c": nn.ReLU()}))
    assert set(found) == {"a", "b"}
    assert isinstance(found["b"], str)


def test_an_output_projection_is_bound_by_its_weight() -> None:
    for target in (
        candidates(MODEL)["layers.0.attn.out_proj"],
        layer_target(MODEL, "layers.0.attn.out_proj"),
    ):
        assert not isinstance(target, (str, type(None)))
        assert target.binding == "parameter"
        assert target.reader is MODEL.layers[0].attn


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("layers.0.q_proj", "layers.0.q_proj"),
        ("layers.0.attn", "layers.0.attn.in_proj_weight"),
        ("layers.0.experts.up", "layers.0.experts.up"),
        ("layers.0.q_proj.weight", "layers.0.q_proj.weight"),
        ("layers.0.norm", None),
        ("layers.7.q_proj", None),
        ("layers.0.q_proj.nothing", None),
    ],
)
def test_the_target_at_a_path(path: str, found: str | None) -> None:
    target = layer_target(MODEL, path)
    assert not isinstance(target, str)
    assert (None if target is None else target.path) == found


def test_the_parameter_at_a_path() -> None:
    assert parameter_target(MODEL, "layers.0.norm.bias") is not None
    assert parameter_target(MODEL, "layers.0.v_proj.bias") is None
    assert parameter_target(MODEL, "layers.0.v_proj") is None
    assert parameter_target(MODEL, "no.such.place") is None


def test_finding_touches_nothing() -> None:
    model = Model()
    before = (
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        [list(m.__dict__) for m in model.modules()],
    )
    find(model)
    find(model, "all-parameters", adapts="parameter")
    assert (
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        [list(m.__dict__) for m in model.modules()],
    ) == before
