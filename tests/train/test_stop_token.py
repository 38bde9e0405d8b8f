"""A stop token that cannot be learnt is found out."""

from __future__ import annotations

import pytest
import torch

import lorakit as lk
from lorakit.models import load_model, load_tokenizer
from lorakit.train.stop_token import stop_token_warning
from tests.peak_bytes import peak_bytes
from tests.tiny_chat import tiny_model, tiny_tokenizer


def warning(twins: int, adapter: object = None, targets: object = "all-linear") -> str | None:
    model = tiny_model()
    with torch.no_grad():
        for i in range(twins):
            model.lm_head.weight[100 + i] = model.lm_head.weight[2] * (1 + i)
    lk.attach(model, adapter or lk.LoRA(r=2), targets=targets)  # type: ignore[arg-type]
    return stop_token_warning(model, tiny_tokenizer(), 2, "default")


def test_a_row_of_its_own_is_fine() -> None:
    assert warning(0) is None


def test_twins_are_counted_and_the_way_out_is_told() -> None:
    told = warning(3)
    assert told is not None
    assert "'<|im_end|>' has all but the same output vector as 3 other tokens" in told
    assert "embed_tokens: {method: token_rows, ids: [2]}" in told


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"]])
def test_who_adapts_the_head_or_the_embedding_is_not_warned(targets: list[str]) -> None:
    assert warning(3, targets=targets) is None


def test_no_copy_of_the_output_layer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.train.stop_token._ROWS_AT_ONCE", 50)
    model = tiny_model()
    lk.attach(model, lk.LoRA(r=2))
    whole = model.lm_head.weight.numel() * 4
    assert peak_bytes(lambda: stop_token_warning(model, tiny_tokenizer(), 2, "default")) < whole / 2
    told = warning(3)
    assert told is not None
    assert "3 other tokens" in told


@pytest.mark.model
def test_a_stop_token_that_instruction_tuning_trained_is_not_complained_about() -> None:
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    lk.attach(model, lk.LoRA(r=1), targets=["q_proj"], name="a")
    assert stop_token_warning(model, tokenizer, int(tokenizer.eos_token_id), "a") is None
