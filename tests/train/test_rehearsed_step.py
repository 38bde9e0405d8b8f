"""What the planner says of a step with compiled parts is what that step keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.ops.native.training import kernels
from lorakit.plan import Architecture, Run, count
from lorakit.plan.rehearsal import Rehearsal
from lorakit.train import Recipe
from lorakit.train.estimating import estimate
from lorakit.train.fused_layers import fused_layers
from lorakit.train.loss import summed_loss
from lorakit.train.packing import pack
from lorakit.train.rehearsed_step import CompiledStep, compiled_step
from lorakit.train.tasks import task_of
from tests.kept_bytes import kept_for_backward

transformers = pytest.importorskip("transformers")
compiled = pytest.mark.skipif(kernels() is None, reason="the compiled products are not built")
SIZES = {
    "vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
DOCUMENTS, LENGTH = 3, 32


def llama(name: str = "Llama", **settings: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**SIZES, **settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).train()


def rehearsed(form: CompiledStep | None, name: str = "Llama", **settings: Any) -> Any:
    with torch.device("meta"):
        base = Architecture("tiny", "", "", llama(name, **settings))
    counts = count(base.model, lk.LoRA(r=4))
    made = Rehearsal(base.model, counts, device="cpu", dtype=torch.float32)
    return made.train_step(DOCUMENTS, LENGTH, packing=True, form=form)


def kept_in_earnest(model: nn.Module) -> int:
    """Bytes of the storages that autograd keeps of a real step as `lorakit train` makes it."""
    lk.attach(model, lk.LoRA(r=4))
    batch = pack([[5] * LENGTH] * DOCUMENTS)
    batch["labels"] = batch["input_ids"].clone()
    with fused_layers(model, packs=True) as number:  # type: ignore[arg-type]
        assert number > 3 * SIZES["num_hidden_layers"]
        with kept_for_backward(model) as kept:
            loss = summed_loss(model, model, batch)  # type: ignore[arg-type]
    gradient = (
        DOCUMENTS * LENGTH * SIZES["hidden_size"] * 4
    )  # of what the head reads: made at once, kept by the loss
    assert loss.requires_grad
    return kept.bytes + gradient


@compiled
def test_what_is_kept_is_what_the_compiled_step_keeps() -> None:
    found = rehearsed(CompiledStep(compiled=True, in_parts=True))
    assert found.kept == pytest.approx(kept_in_earnest(llama()), rel=0.03)


@compiled
def test_compiled_layers_keep_less() -> None:
    plain, fused = (rehearsed(CompiledStep(flag, in_parts=True)) for flag in (False, True))
    assert fused.kept < 0.8 * plain.kept
    assert fused.peak < 0.8 * plain.peak


@compiled
def test_a_window_that_is_shorter_than_a_document_is_not_taken() -> None:
    short, long = (
        rehearsed(CompiledStep(compiled=True, in_parts=True), "Mistral", sliding_window=window)
        for window in (LENGTH - 1, LENGTH)
    )
    assert long.kept < short.kept


def test_logits_in_parts_are_not_kept() -> None:
    whole, parts = rehearsed(None), rehearsed(CompiledStep(compiled=False, in_parts=True))
    logits = DOCUMENTS * LENGTH * SIZES["vocab_size"] * 4
    gradient = DOCUMENTS * LENGTH * SIZES["hidden_size"] * 4  # of what the layer reads, in their place
    assert parts.kept == pytest.approx(whole.kept - logits + gradient, abs=4096)


def test_logits_that_are_changed_after_the_layer_are_made_whole() -> None:
    form = CompiledStep(compiled=False, in_parts=True)
    settings = {"logit_scale": 0.5}
    assert rehearsed(form, "Cohere", **settings) == rehearsed(None, "Cohere", **settings)


@compiled
def test_an_estimate_follows_the_recipe(recipe: Callable[..., Recipe]) -> None:
    def activations(**settings: Any) -> int:
        training = estimate(recipe(**settings)).plan.training
        assert training is not None
        return training.activations

    assert activations(fused=True) < activations(fused=False)


def test_what_a_recipe_asks_for(recipe: Callable[..., Recipe]) -> None:
    def form(run: Run, **settings: Any) -> CompiledStep | None:
        return compiled_step(task_of(recipe(**settings)), run)

    cpu, cuda = (Run(device=device, packing=True) for device in ("cpu", "cuda"))
    built = kernels() is not None
    plain = CompiledStep(compiled=False, in_parts=True, native=False)
    assert form(cpu) == form(Run(device="cpu", padded=True)) == CompiledStep(built, True, built)
    assert form(cpu, fused=False) == CompiledStep(compiled=False, in_parts=True, native=built)
    assert form(cuda) == form(Run(device="cpu", dtype="bfloat16", packing=True)) == plain
