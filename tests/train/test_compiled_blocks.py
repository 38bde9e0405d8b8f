"""Compiled training steps: the same losses, and the model is as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lorakit.errors import ConfigError, KernelError, MissingDependencyError
from lorakit.train import Recipe, train
from lorakit.train import compiled_blocks as module
from tests.tiny_chat import tiny_model, tiny_tokenizer

MakeRecipe = Callable[..., Recipe]


def assert_the_same(recipe: MakeRecipe, batching: str, layers: int) -> None:
    """Four steps compiled give the losses of four plain ones, and graphs were really made."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    def run(name: str, compile: bool) -> Any:
        made = recipe(name, max_steps=4, compile=compile, batching=batching, fused=False)
        return train(made, model=tiny_model(num_hidden_layers=layers), tokenizer=tiny_tokenizer())

    plain = run("plain", False)
    torch._dynamo.reset()
    counters.clear()
    compiled = run("compiled", True)
    assert counters["stats"]["unique_graphs"] >= layers
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert all(block._compiled_call_impl is None for block in compiled.model.model.layers)


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_the_graphs_give_the_losses_of_the_plain_run(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    monkeypatch.setattr(
        module, "_BACKEND", "aot_eager"
    )  # all but the code of the kernels, which takes minutes
    assert_the_same(recipe, batching, layers=2)


@pytest.mark.slow
def test_the_compiled_code_gives_the_losses_of_the_plain_run(recipe: MakeRecipe) -> None:
    assert_the_same(recipe, "packed", layers=1)


@pytest.mark.slow
def test_more_blocks_than_the_compilers_own_limit_are_all_compiled(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BACKEND", "eager")
    assert_the_same(recipe, "padded", layers=20)


def test_a_machine_without_a_compiler_is_told_so(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[str]:
        raise KernelError("there is no g++")

    monkeypatch.setattr(module, "find_compiler", none)
    model = tiny_model()
    with pytest.raises(MissingDependencyError, match="there is no g"):
        train(recipe(compile=True), model=model, tokenizer=tiny_tokenizer())
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_model_without_blocks_is_refused() -> None:
    import torch

    with pytest.raises(ConfigError, match="Linear has no list of blocks"):
        module.CompiledBlocks(torch.nn.Linear(2, 2))
