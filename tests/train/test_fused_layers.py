"""The compiled form of a decoder's parts gives what transformers gives, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit as lk
from lorakit.ops.native.training import kernels
from lorakit.train import fused_layers as tested
from lorakit.train.fused_layers import fused_layers
from lorakit.train.loss import summed_loss
from lorakit.train.packing import pack, packed
from lorakit.train.render import IGNORED

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(kernels() is None, reason="the compiled products are not built")

SIZES = {
    "vocab_size": 60, "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attention_dropout": 0.0,
}  # fmt: skip
OTHERWISE = (
    "Cohere",
    "Olmo",
    "Gemma",
    "Phi3",
    "Qwen3",
    "SmolLM3",
    "Glm",
    "Granite",
    "Starcoder2",
)
KNOWN = ("Llama", "Mistral", "Qwen2")


def model_of(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for key, parameter in model.named_parameters():
        if "norm" in key:
            parameter.data.uniform_(0.5, 1.5)
    return model.train()


def adapted(model: Any) -> Any:
    lk.attach(model, lk.LoRA(r=4), targets="all-linear", seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in lk.trainable(model).values():
        parameter.data.normal_(0, 0.1, generator=generator)
    return model


def learn(model: Any) -> tuple[Tensor, list[Tensor]]:
    documents = [list(range(3, 3 + n)) for n in (33, 1, 40)]
    batch = pack(documents)
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] < 9, IGNORED)
    with packed(model):
        loss = summed_loss(model, model, batch)
        return loss, list(torch.autograd.grad(loss, list(lk.trainable(model).values())))


def same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    assert one[0].item() == pytest.approx(other[0].item(), rel=1e-6)
    largest = max(float(b.abs().max()) for b in other[1])
    for a, b in zip(one[1], other[1], strict=True):
        # What all but cancels has few digits of its own.
        assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max()) + 1e-7 * largest


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients(name: str, checkpointing: bool) -> None:
    model = adapted(model_of(name, **({"sliding_window": None} if name == "Mistral" else {})))
    expected = learn(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    before = {name: module.__dict__.keys() for name, module in model.named_modules()}
    with fused_layers(model, packs=True) as number:
        assert number == 9  # two blocks with two norms, a gate and an attention each; a norm
        calls = counted(model)
        same(learn(model), expected)
        assert calls["attention"] >= 2
        # A block's q, k and v are read together, its output layer alone, and its perceptron is one function.
        assert calls["gated_products_back"] == calls["add_product_back_onto"] == 2
        assert calls["add_products_back"] == 4
        assert calls["swiglu"] == 0
        assert calls["rms_norm"] >= 5
    assert {name: module.__dict__.keys() for name, module in model.named_modules()} == before
    same(learn(model), expected)


@pytest.mark.parametrize("name", OTHERWISE)
def test_whatever_is_taken_of_others_is_right(name: str) -> None:
    """Rotations in pairs, of a part of a head or in some blocks, norms inside: taken where it is the same.

    Their numbers are large here, so that attention matters: rounding is measured beside torch's own.
    """
    model = adapted(model_of(name))
    for key, parameter in model.named_parameters():
        if "q_proj" in key or "k_proj" in key:
            parameter.data.mul_(5)
    usual = learn(model)
    with fused_layers(model, packs=True):
        fused = learn(model)
    exact = learn(model.double())
    for mine, theirs, right in zip(fused[1], usual[1], exact[1], strict=True):
        size = float(right.abs().max())
        assert float((mine - right).abs().max()) <= 20 * float((theirs - right).abs().max()) + 1e-5 * size


COUNTED = (
    "attention", "swiglu", "rms_norm", "add_products_back", "add_product_back_onto", "gated_products_back",
)  # fmt: skip


def counted(model: Any) -> dict[str, int]:
    """Counts the calls of the library that come from here on."""
    library = kernels()
    assert library is not None
    calls = dict.fromkeys(COUNTED, 0)
    for name in calls:
        original = getattr(type(library), name)

        def call(*given: Any, _original: Any = original, _name: str = name, **named: Any) -> Any:
            calls[_name] += 1
            return _original(library, *given, **named)

        library.__dict__[name] = call
    model.register_forward_hook(lambda *_: None)
    return calls


@pytest.fixture(autouse=True)
def uncounted() -> Any:
    yield
    library = kernels()
    for name in COUNTED:
        if library is not None:
            library.__dict__.pop(name, None)


def doubled(model: Any) -> None:
    adapted(model).model.layers[0].mlp.gate_proj.register_forward_hook(lambda *given: 2 * given[2])


def halved(model: Any) -> None:
    adapted(model).model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda _, args: (args[0] / 2,))


def partly_adapted(model: Any) -> None:
    lk.attach(model, lk.LoRA(r=4), targets=["q_proj", "up_proj", "down_proj"], seed=0)


def twice_adapted(model: Any) -> None:
    lk.attach(adapted(model), lk.LoRA(r=2), targets="all-linear", name="second", seed=1)
    lk.set_active(model, {"default": 0.5, "second": 2.0})


def with_dropout(model: Any) -> None:
    lk.attach(model, lk.LoRA(r=4, dropout=0.3), targets="all-linear", seed=0)


def with_biases(model: Any) -> None:
    lk.attach(model, lk.LoRA(r=4, bias=True), targets="all-linear", seed=0)


def with_dora(model: Any) -> None:
    lk.attach(model, lk.DoRA(lk.LoRA(r=4)), targets="all-linear", seed=0)


def with_frozen_projections(model: Any) -> None:
    lk.attach(model, lk.LoRAFA(r=4), targets="all-linear", seed=0)


def with_a_trained_layer(model: Any) -> None:
    adapted(model).model.layers[0].mlp.up_proj.weight.requires_grad_(True)


def with_a_subtracted_start(model: Any) -> None:
    lk.attach(model, lk.LoRA(r=4, init="pissa"), targets="all-linear", seed=0)


@pytest.mark.parametrize(
    "change",
    [
        doubled, halved, partly_adapted, twice_adapted, with_dropout, with_biases, with_dora, with_frozen_projections,
        with_a_trained_layer, with_a_subtracted_start,
    ],
)  # fmt: skip
def test_layers_that_do_more_than_add_a_product(change: Any) -> None:
    model = model_of("Llama")
    change(model)
    torch.manual_seed(5)
    expected = learn(model)
    with fused_layers(model, packs=True) as number:
        assert number == 9
        torch.manual_seed(5)
        same(learn(model), expected)


def test_whoever_watches_all_modules_sees_every_layer() -> None:
    model = adapted(model_of("Llama"))
    expected = learn(model)
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        with fused_layers(model, packs=True):
            same(learn(model), expected)
    finally:
        handle.remove()
    assert seen.count("Linear") >= 14


def test_padded_batches() -> None:
    model = adapted(model_of("Llama")).eval()
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    with torch.no_grad():
        expected = model(**batch).logits
        with fused_layers(model, packs=False) as number:
            assert number
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
            ids = batch["input_ids"][:1]
            assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize(
    "model",
    [
        lambda: model_of("Llama").to(torch.bfloat16),
        lambda: model_of("Llama").to("meta"),
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2)
        ),
    ],
    ids=["bf16", "meta", "gpt2"],
)
def test_what_is_not_taken(model: Any) -> None:
    with fused_layers(model(), packs=False) as number:
        assert number == 0


def test_parts_that_are_trained_are_left() -> None:
    model = model_of("Llama").requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    model.model.layers[0].input_layernorm.weight.data[3] = 0
    with fused_layers(model, packs=True) as number:
        assert number == 7
        assert "forward" not in model.model.norm.__dict__
        assert "forward" not in model.model.layers[0].input_layernorm.__dict__


def test_what_would_give_something_else_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(model_of("Llama"))
    monkeypatch.setattr(tested, "_norm", lambda module, original, x: 1.01 * original(x))
    with fused_layers(model, packs=True) as number:
        assert number == 4
        assert not any(
            "forward" in module.__dict__ for module in model.modules() if "Norm" in type(module).__name__
        )


def test_sliding_windows_and_dropout_go_the_usual_way() -> None:
    for name, settings in (("Mistral", {"sliding_window": 8}), ("Llama", {"attention_dropout": 0.5})):
        model = adapted(model_of(name, **settings))
        torch.manual_seed(5)
        expected = learn(model)
        with fused_layers(model, packs=True) as number:
            assert number == 9
            calls = counted(model)
            torch.manual_seed(5)
            same(learn(model), expected)
            assert calls["attention"] == 0
