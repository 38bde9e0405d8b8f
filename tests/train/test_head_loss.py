"""The loss from what the output layer reads is that of whole logits, in value and in every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorakit as lk
from lorakit.train import head_loss as tested
from lorakit.train.head_loss import head_aside, head_loss, separable_head
from lorakit.train.packing import pack, packed
from tests.tiny_chat import tiny_model

transformers = pytest.importorskip("transformers")


def changed(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in lk.trainable(model).values():
        parameter.data.normal_(0, 0.1, generator=generator)


def plain(model: nn.Module) -> None:
    model.requires_grad_(False)


def adapted(model: nn.Module) -> None:
    lk.attach(model, lk.LoRA(r=3), targets=["lm_head"])
    changed(model)


def dora(model: nn.Module) -> None:
    lk.attach(model, lk.DoRA(lk.LoRA(r=3)), targets=["lm_head"])
    changed(model)


def trained(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)


@pytest.mark.parametrize("prepare", [plain, adapted, dora, trained])
@pytest.mark.parametrize("entries", [1, 800, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_whole(
    prepare: Callable[[nn.Module], None], entries: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tested, "_ENTRIES_AT_ONCE", entries)
    model = tiny_model()
    prepare(model)
    model.to(dtype)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, model.lm_head.in_features, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(model.lm_head.out_features, (13,), generator=generator)
    learnt = [hidden, *(p for p in model.lm_head.parameters() if p.requires_grad)]
    loss = head_loss(hidden, model.lm_head, targets)
    whole = F.cross_entropy(model.lm_head(hidden), targets, reduction="sum")
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for one, other in zip(
        torch.autograd.grad(3 * loss, learnt), torch.autograd.grad(3 * whole, learnt), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert head_loss(hidden, model.lm_head, targets).item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("prepare", [plain, adapted])
def test_nothing_to_learn_is_no_loss(prepare: Callable[[nn.Module], None]) -> None:
    model = tiny_model()
    prepare(model)
    hidden = torch.empty(0, model.lm_head.in_features, requires_grad=True)
    loss = head_loss(hidden, model.lm_head, torch.empty(0, dtype=torch.long))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, [hidden])[0].shape == hidden.shape


@pytest.mark.parametrize(
    "watch",
    [
        lambda head, seen: head.register_forward_hook(lambda *_: seen.append("forward")),
        lambda head, seen: head.register_forward_pre_hook(lambda *_: seen.append("before")),
        lambda head, seen: head.register_full_backward_hook(lambda *_: seen.append("backward")),
    ],
)
def test_whoever_watches_the_head_sees_it(watch: Callable[[nn.Module, list[str]], object]) -> None:
    model = tiny_model()
    plain(model)
    seen: list[str] = []
    watch(model.lm_head, seen)
    hidden = torch.randn(3, model.lm_head.in_features, requires_grad=True)
    torch.autograd.grad(head_loss(hidden, model.lm_head, torch.zeros(3, dtype=torch.long)), [hidden])
    assert seen


def test_a_head_aside() -> None:
    model = tiny_model().eval()
    lk.attach(model, lk.LoRA(r=3), targets=["lm_head"])
    changed(model)
    batch = {"input_ids": torch.arange(5)[None]}
    with torch.no_grad():
        logits = model(**batch).logits
        with head_aside(model, model.lm_head):
            hidden = model(**batch).logits
        with pytest.raises(ZeroDivisionError), head_aside(model, model.lm_head):
            1 / 0  # noqa: B018
        assert hidden.shape == (1, 5, model.config.hidden_size)
        assert torch.equal(model.lm_head(hidden), logits)
        assert torch.equal(model(**batch).logits, logits)  # as it was


def test_a_packed_model_is_tried_packed() -> None:
    model = tiny_model()
    with packed(model):
        assert separable_head(model) is model.lm_head
        model(**pack([[1, 2]]))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("Gemma2", {"final_logit_softcapping": 5.0}), ("Granite", {"logits_scaling": 3.0})],
)
def test_what_comes_after_the_layer_is_not_left_out(name: str, settings: dict[str, float]) -> None:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    assert separable_head(model) is None
    assert model.get_output_embeddings() is model.lm_head


def test_models_without_an_output_layer() -> None:
    model = transformers.BertModel(
        transformers.BertConfig(vocab_size=20, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    )
    assert separable_head(model) is None
