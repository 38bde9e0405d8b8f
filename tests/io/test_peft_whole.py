"""Token rows and whole parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakit.core.target import Shape
from lorakit.errors import AdapterFileError
from lorakit.io.embedded import Embedded
from lorakit.io.outline import Outline
from lorakit.io.peft_config import DEFAULTS
from lorakit.io.peft_keys import sort_keys
from lorakit.io.peft_whole import parameter_shape, read_token_rows, read_whole_parameters

ROWS = torch.randn(2, 8)
A, B = torch.randn(2, 6), torch.randn(4, 2)


def rows(
    indices: Any, *paths: str, embedded: Embedded | None = None, outline: Outline | None = None
) -> dict[str, Any]:
    keys = sort_keys([(f"{path}.token_adapter.trainable_tokens_delta", ROWS) for path in paths])
    found = read_token_rows(keys, {**DEFAULTS, "trainable_token_indices": indices}, embedded, outline)
    return {path: (method.ids, shape) for path, method, shape, _ in found}


def test_ids_come_from_the_configuration() -> None:
    unknown = Shape("embedding", 8, 0)
    assert rows([5, 2], "m.wte") == {"m.wte": ((5, 2), unknown)}
    assert rows({"wte": [5, 2]}, "m.wte") == {"m.wte": ((5, 2), unknown)}
    assert rows({"wte": [5, 2], "enc.wte": [1, 3]}, "enc.wte", "dec.wte") == {
        "enc.wte": ((1, 3), unknown),
        "dec.wte": ((5, 2), unknown),
    }
    assert rows({"wte": [5, 2], "lm_head": [5, 2]}, "m.wte") == {
        "m.wte": ((5, 2), unknown)
    }  # tied: kept once
    assert rows(None) == rows([]) == {}


def test_the_size_of_the_table() -> None:
    outline = Outline({"m.wte.weight": (11, 8), "head.weight": (11, 8)}, embeddings=frozenset({"m.wte"}))
    assert rows([5, 2], "m.wte", outline=outline)["m.wte"][1] == Shape("embedding", 8, 11)
    assert rows([5, 2], "head", outline=outline)["head"][1] == Shape("linear", 11, 8)
    assert rows([5, 2], "m.lm_head")["m.lm_head"][1] == Shape("linear", 0, 8)
    embedded = Embedded({}, tables={"x": ["linear", 7, 8]})
    assert rows([5, 2], "x", embedded=embedded)["x"][1] == Shape("linear", 7, 8)


@pytest.mark.parametrize(
    ("indices", "paths", "message"),
    [
        (None, ["wte"], "trainable_token_indices is not set"),
        ([1, 2], [], "rows for 0 tables"),
        ([1, 2], ["a", "b"], "rows for 2 tables: a, b"),
        ({"wte": [1, 2]}, ["wpe"], "token rows for 'wpe'; trainable_token_indices names wte"),
        ({"wte": [1, 2], "wpe": [1]}, ["wte"], "names 'wpe', but the file has no token rows"),
    ],
)
def test_ids_and_rows_that_do_not_go_together(indices: Any, paths: list[str], message: str) -> None:
    with pytest.raises(AdapterFileError, match=message):
        rows(indices, *paths)


def whole(*keys: str, **settings: Any) -> tuple[list[str], list[str], list[str]]:
    tensors = [("fc.lora_A.weight", A), ("fc.lora_B.weight", B), *((key, torch.ones(3)) for key in keys)]
    found = read_whole_parameters(sort_keys(tensors), {**DEFAULTS, **settings})
    return [path for path, *_ in found.targets], found.tables, found.unexpected


def test_modules_to_save() -> None:
    assert whole("a.head.weight", "a.head.dense.bias", modules_to_save=["head"]) == (
        ["a.head.weight", "a.head.dense.bias"],
        [],
        [],
    )
    assert whole("a.head.modules_to_save.weight", modules_to_save=["head"])[0] == ["a.head.weight"]
    assert whole("a.head.modules_to_save.default.weight", modules_to_save=["head"])[0] == ["a.head.weight"]
    assert whole("a.header.weight", modules_to_save=["head"])[2] == ["a.header.weight"]


def test_biases() -> None:
    assert whole("fc.base_layer.bias", bias="lora_only")[0] == ["fc.bias"]
    assert whole("norm.bias", bias="lora_only")[2] == ["norm.bias"]
    assert whole("norm.bias", "fc.base_layer.bias", "bias", bias="all")[0] == ["norm.bias", "fc.bias", "bias"]


def test_tables_that_peft_saves_unasked() -> None:
    assert whole("m.embed_tokens.weight", "lm_head.weight", "other.weight") == (
        ["m.embed_tokens.weight", "lm_head.weight"],
        ["m.embed_tokens.weight", "lm_head.weight"],
        ["other.weight"],
    )
    assert whole("fc.base_layer.weight") == (["fc.weight"], [], [])
    assert whole("fc.base_layer.scale")[2] == ["fc.base_layer.scale"]


def test_shapes() -> None:
    assert parameter_shape(torch.ones(3)) == Shape("parameter", 3, 1, stored=(3,))
    assert parameter_shape(torch.tensor(1.0)) == Shape("parameter", 1, 1, stored=())
    assert parameter_shape(torch.ones(2, 3, 4)) == Shape("parameter", 3, 4, (2,), stored=(2, 3, 4))
