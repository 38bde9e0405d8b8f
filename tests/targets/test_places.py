"""Choosing attentions and inputs: presets, names, expressions, callables, and what is said when nothing fits."""

from __future__ import annotations

import pytest

import lorakit as lk
from lorakit.errors import UnmatchedTargetError
from tests.attach.readers import reader


def found(targets: object, exclude: object = None) -> list[str]:
    return [t.path for t in lk.find(reader("llama"), targets, exclude=exclude, adapts="attention")]  # type: ignore[arg-type]


FIRST, SECOND = "model.layers.0.self_attn", "model.layers.1.self_attn"


def test_ways_to_choose() -> None:
    assert found("all-attention") == found(["self_attn"]) == found([SECOND, FIRST]) == [FIRST, SECOND]
    assert found(["layers.1.self_attn"]) == found(r".*1\.self_attn") == [SECOND]
    assert found(["layers.1"]) == [SECOND]
    assert found(lambda path, module: module.layer_idx == 1) == [SECOND]
    assert found("all-attention", exclude=["layers.0"]) == [SECOND]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("all-attentoin", r"Did you mean|matches no attention"),
        ("self_attn", r"give a list: \['self_attn'\]"),
        (["self_atn"], "Did you mean 'self_attn'"),
        (lambda path, module: False, "chose no attention of 2"),
        ("all-inputs", "chooses each model input"),
        ("all-bias", "chooses layers or parameters"),
    ],
)
def test_what_fits_nothing(targets: object, message: str) -> None:
    with pytest.raises(UnmatchedTargetError, match=message):
        found(targets)


def test_a_mapping_names_places_and_layers() -> None:
    model = reader("llama")
    report = lk.attach(
        model,
        {
            "all-attention": lk.PrefixTuning(length=2),
            "all-linear": lk.LoRA(r=2),
            "all-inputs": lk.PromptTuning(),
        },
    )
    kinds = [site.kind for site in report.sites]
    assert kinds.count("attention") == 2
    assert kinds.count("model") == 1
    assert kinds.count("linear") == 14
    model(input_ids=model.dummy_inputs["input_ids"] % 50)
    assert lk.report(model).never_ran == ()
