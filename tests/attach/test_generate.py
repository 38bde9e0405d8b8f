"""transformers' generate, with its cache, under blocks, rows and merges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import RoutingError
from tests.attach.architectures import ids, llama, t5
from tests.attach.small_models import fill


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made = llama()
    for i, name in enumerate("ab"):
        lk.attach(made, lk.LoRA(r=4), name=name)
        fill(made, name, seed=i, std=0.3)
    return made


def generate(model: nn.Module, prompt: Tensor, **settings: Any) -> Tensor:
    return model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8, do_sample=False,
        pad_token_id=0, **settings,
    )  # fmt: skip


def test_the_cache_belongs_to_the_adapter(model: nn.Module) -> None:
    found = {}
    for name in ("a", "b", None):
        with lk.use(model, name):
            found[name] = generate(model, ids())
            assert torch.equal(generate(model, ids(), use_cache=False), found[name])
    assert not torch.equal(found["a"], found["b"])
    assert not torch.equal(found["a"], found[None])


def test_rows_generate_what_each_adapter_generates_alone(model: nn.Module) -> None:
    rows: list[Any] = ["b", None, "a"]
    with lk.use(model, rows=rows):
        mixed = generate(model, ids())
    for i, row in enumerate(rows):
        with lk.use(model, row):
            assert torch.equal(generate(model, ids()[i : i + 1])[0], mixed[i])


def test_beams_repeat_the_rows_and_the_error_says_so(model: nn.Module) -> None:
    rows: list[Any] = ["b", None, "a"]
    with (
        lk.use(model, rows=rows),
        pytest.raises(RoutingError, match=r"names 3 rows.*after any repetition by beams"),
    ):
        generate(model, ids(), num_beams=2)
    with lk.use(model, rows=[row for row in rows for _ in range(2)]):
        mixed = generate(model, ids(), num_beams=2)
    for i, row in enumerate(rows):
        with lk.use(model, row):
            assert torch.equal(generate(model, ids()[i : i + 1], num_beams=2)[0], mixed[i])


def test_merged_generates_what_unmerged_generates(model: nn.Module) -> None:
    with lk.use(model, "b"):
        want = generate(model, ids())
    lk.merge(model, "b")
    try:
        assert torch.equal(generate(model, ids()), want)
    finally:
        lk.unmerge(model)


def test_an_encoder_and_decoder() -> None:
    torch.manual_seed(0)
    model = t5()
    lk.attach(model, lk.LoRA(r=4), name="a")
    fill(model, std=0.3)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    adapted = model.generate(input_ids=ids(), **settings)
    with lk.use(model, rows=["a", None, "a"]):
        mixed = model.generate(input_ids=ids(), **settings)
    assert torch.equal(mixed[[0, 2]], adapted[[0, 2]])
    with lk.use(model, None):
        assert torch.equal(mixed[1], model.generate(input_ids=ids(), **settings)[1])
