"""Our own form."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from lorakit.core import AdapterSpec, AdapterState
from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError
from lorakit.io.native import read_native, to_native
from lorakit.methods import BitFit, DoRA, LoRA, TokenRows
from tests.io.states import assert_equal


def state() -> AdapterState:
    methods = {
        "a.conv": DoRA(LoRA(r=2)),
        "b.conv": DoRA(LoRA(r=2)),
        "c.bias": BitFit(),
        "wte": TokenRows((4, 1)),
    }
    conv = Shape("conv", 3, 8, (2,), (2, 2))
    shapes = {
        "a.conv": conv,
        "b.conv": conv,
        "c.bias": Shape("parameter", 5, 1, stored=(5,)),
        "wte": Shape("embedding", 6, 9),
    }
    tensors = {p: {n: torch.randn(s) for n, s in m.shapes(shapes[p]).items()} for p, m in methods.items()}
    return AdapterState(AdapterSpec(methods, shapes, "org/base", {"task": "sql"}), tensors)


def as_file(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config))


def test_round_trip_and_what_stands_there() -> None:
    config, tensors = to_native(state(), ["a reason"])
    assert config["peft_type"] == "LORAKIT"
    assert config["lorakit"]["why_not_peft"] == ["a reason"]
    assert len(config["lorakit"]["methods"]) == 3  # the two DoRAs are one
    assert set(tensors) >= {"a.conv|lora_A", "a.conv|magnitude", "c.bias|value", "wte|rows"}
    original = state()
    config, tensors = to_native(original, [])
    assert_equal(read_native(as_file(config), tensors), original)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("lorakit"), "version None"),
        (lambda c: c["lorakit"].update(format=2), "version 2; this lorakit reads version 1"),
        (
            lambda c: c["lorakit"]["methods"][0].update(method="lora-from-the-future"),
            "method that is not known here.*lora-from-the-future",
        ),
        (lambda c: c["lorakit"]["methods"][0].update(extra=1), "no setting 'extra'"),
        (lambda c: c["lorakit"]["targets"][0].pop("out"), "not as lorakit writes it.*'out'"),
        (lambda c: c["lorakit"]["targets"][0].update(method=9), "not as lorakit writes it"),
        (lambda c: c["lorakit"].update(targets=3), "not as lorakit writes it"),
        (lambda c: c["lorakit"]["targets"].pop(0), "3 unexpected: a.conv|lora_A"),
    ],
)
def test_damage(damage: Any, message: str) -> None:
    config, tensors = to_native(state(), [])
    config = as_file(config)
    damage(config)
    with pytest.raises(AdapterFileError, match=message):
        read_native(config, tensors)


def test_missing_and_misnamed_tensors() -> None:
    config, tensors = to_native(state(), [])
    tensors["wte|row"] = tensors.pop("wte|rows")
    with pytest.raises(
        AdapterFileError, match=r"1 missing: wte\|rows. 1 unexpected: wte\|row. Did you mean 'wte\|rows'"
    ):
        read_native(as_file(config), tensors)


def test_a_tensor_of_another_size() -> None:
    config, tensors = to_native(state(), [])
    tensors["wte|rows"] = copy.copy(tensors["wte|rows"][:1])
    with pytest.raises(AdapterFileError, match="wte"):
        read_native(as_file(config), tensors)
