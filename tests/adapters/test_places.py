"""Layers and kinds, as they are read from paths."""

from __future__ import annotations

from lorakit.adapters.places import Place, places


def test_a_language_model() -> None:
    paths = [f"model.layers.{n}.{leaf}" for n in (0, 1, 10) for leaf in ("self_attn.q_proj", "mlp.up_proj")]
    found = places([*paths, "lm_head"])
    assert found["model.layers.10.self_attn.q_proj"] == Place("model.layers.10", 10, "q_proj")
    assert found["model.layers.0.mlp.up_proj"] == Place("model.layers.0", 0, "up_proj")
    assert found["lm_head"] == Place("", None, "lm_head")


def test_endings_that_two_kinds_have_are_told_apart() -> None:
    paths = [
        f"encoder.layer.{n}.{leaf}" for n in range(2) for leaf in ("attention.output.dense", "output.dense")
    ]
    assert {place.kind for place in places(paths).values()} == {"attention.output.dense", "output.dense"}


def test_numbers_that_never_differ_are_part_of_the_name() -> None:
    paths = [
        f"unet.down_blocks.{n}.attentions.{m}.transformer_blocks.0.attn{a}.to_out.0"
        for n in range(3)
        for m in range(2)
        for a in (1, 2)
    ]
    found = places(paths)
    last = found["unet.down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0"]
    assert last == Place("unet.down_blocks.2", 2, "attn2.to_out.0")


def test_experts_are_of_one_kind() -> None:
    found = places([f"layers.{n}.experts.{e}.w1" for n in range(2) for e in range(4)])
    assert set(found.values()) == {Place("layers.0", 0, "w1"), Place("layers.1", 1, "w1")}


def test_a_single_layer_is_no_sequence() -> None:
    assert places(["layers.0.q", "layers.0.k"])["layers.0.q"] == Place("", None, "q")


def test_whole_parameters_say_of_which_layer() -> None:
    assert places(["classifier.weight", "classifier.bias"])["classifier.bias"].kind == "classifier.bias"
    assert places(["weight"])["weight"].kind == "weight"


def test_nothing() -> None:
    assert places([]) == {}
    assert places([""]) == {"": Place("", None, "")}
