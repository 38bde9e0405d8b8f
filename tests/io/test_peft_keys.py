"""Taking keys apart."""

from __future__ import annotations

import pytest
import torch

from lorakit.errors import AdapterFileError
from lorakit.io.peft_keys import sort_keys

T = torch.zeros(1)


@pytest.mark.parametrize(
    ("key", "path", "name"),
    [
        ("a.b.lora_A.weight", "a.b", "lora_A"),
        ("a.b.lora_B.sql.weight", "a.b", "lora_B"),
        ("a.b.lora_B.bias", "a.b", "lora_bias"),
        ("a.b.lora_B.sql.bias", "a.b", "lora_bias"),
        ("a.lora_embedding_A", "a", "embedding_A"),
        ("a.lora_embedding_B.default", "a", "embedding_B"),
        ("a.lora_magnitude_vector", "a", "magnitude"),
        ("a.lora_magnitude_vector.weight", "a", "magnitude"),
        ("a.lora_magnitude_vector.sql", "a", "magnitude"),
        ("a.lora_magnitude_vector.sql.weight", "a", "magnitude"),
        ("_orig_mod.a._orig_mod.b.lora_A.weight", "a.b", "lora_A"),
        ("_fsdp_wrapped_module.a.lora_A.weight", "a", "lora_A"),
        ("a.lora_B.x.lora_A.weight", "a.lora_B.x", "lora_A"),  # a module's own name
    ],
)
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_factors(key: str, path: str, name: str, prefix: str) -> None:
    factors = sort_keys([(prefix + key, T)]).factors
    assert {p: list(group) for p, group in factors.items()} == {path: [name]}


def test_rows_and_others() -> None:
    keys = sort_keys([("e.token_adapter.trainable_tokens_delta", T), ("h.weight", T), ("lora_A.weight", T)])
    assert list(keys.rows) == ["e"]
    assert list(keys.others) == ["h.weight", "lora_A.weight"]


def test_only_one_prefix_is_taken_off() -> None:
    keys = sort_keys([("base_model.model.base_model.model.x.lora_A.weight", T)])
    assert list(keys.factors) == ["base_model.model.x"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["base_model.model.a.lora_A.weight", "a.lora_B.weight"],
            "1 keys of the file start with.*a.lora_B.weight",
        ),
        (["a.lora_A.one.weight", "a.lora_B.two.weight"], "several adapters: one, two"),
        (["a.lora_A.weight", "_orig_mod.a.lora_A.weight"], "twice"),
        (["a.weight", "a._orig_mod.weight"], "twice"),
    ],
)
def test_keys_that_do_not_go_together(keys: list[str], message: str) -> None:
    with pytest.raises(AdapterFileError, match=message):
        sort_keys([(key, T) for key in keys])
