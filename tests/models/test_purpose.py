"""What an adapter says it was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lorakit as lk
from lorakit.errors import ConfigError
from lorakit.models.purpose import Purpose, common_purpose, kind_of_class, purpose_in


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({}, Purpose()),
        ({"task": "dpo", "peft": {"task_type": "CAUSAL_LM"}}, Purpose("causal-lm")),
        ({"task": "embedding", "pooling": "mean"}, Purpose("feature-extraction")),
        ({"task": "regression", "labels": ["value"]}, Purpose("sequence-classification", ("value",))),
        ({"task": "token-classification", "labels": ["O", "B"]}, Purpose("token-classification", ("O", "B"))),
        ({"peft": {"task_type": "SEQ_2_SEQ_LM"}}, Purpose("seq2seq")),
        ({"peft": {"task_type": "SEQ_CLS"}}, Purpose("sequence-classification")),
        ({"task": "of tomorrow", "labels": ["a"]}, Purpose()),
    ],
)
def test_lorakits_word_goes_before_pefts(info: dict[str, Any], expected: Purpose) -> None:
    assert purpose_in(info) == expected


def saved(folder: Path, **info: Any) -> Path:
    model = nn.Sequential(nn.Linear(4, 4))
    lk.attach(model, lk.LoRA(r=1), targets="all-linear")
    state = lk.extract(model)
    spec = lk.AdapterSpec(state.spec.methods, state.spec.shapes, info=info)
    return lk.save(lk.AdapterState(spec, state.tensors), folder)


def test_one_that_says_nothing_goes_along(tmp_path: Path) -> None:
    silent, writer = saved(tmp_path / "silent"), saved(tmp_path / "writer", task="seq2seq")
    assert common_purpose([silent, writer]) == common_purpose([writer, silent]) == Purpose("seq2seq")
    assert common_purpose([silent]) == Purpose()


def test_adapters_for_different_models_are_named(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", task="seq2seq")
    two = saved(tmp_path / "two", task="embedding")
    with pytest.raises(ConfigError, match=r"one is for seq2seq and .*two is for feature-extraction"):
        common_purpose([one, two])
    kinds = saved(tmp_path / "kinds", task="classification", labels=["a", "b"])
    number = saved(tmp_path / "number", task="regression", labels=["value"])
    with pytest.raises(ConfigError, match=r"kinds tells apart a, b, and .*number gives a number"):
        common_purpose([kinds, number])


def test_the_name_of_a_class_tells_its_kind() -> None:
    assert kind_of_class(["GPT2LMHeadModel"]) == kind_of_class(["LlamaForCausalLM"]) == "causal-lm"
    assert kind_of_class(["BertModel"]) == "feature-extraction"
    assert kind_of_class(["ViTForImageClassification"]) == "image-classification"
    assert kind_of_class(["BertForMaskedLM"]) is None
    assert kind_of_class([]) is None
