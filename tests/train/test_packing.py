"""Packed rows compute what separate documents compute, and models for which they would not are found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lorakit as lk
from lorakit.train.collate import PackedCollator, PaddedCollator
from lorakit.train.loss import count_learnt, summed_loss
from lorakit.train.packing import pack, packed, packed_attention, packing_error
from lorakit.train.render import IGNORED, Rendered
from tests.tiny_chat import tiny_model

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
PACKABLE: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "mistral": {**GROUPED, "sliding_window": 4},
    "phi3": {**GROUPED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gemma": {**GROUPED, "head_dim": 8},
    "gpt_neox": COMMON,
    "opt": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
NOT_PACKABLE: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 64},
    "mamba": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def build(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), attn_implementation=None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model.eval()


def rows(count: int = 5, vocabulary: int = 97) -> list[Rendered]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids = torch.randint(3, vocabulary, (5 + 3 * i,), generator=generator).tolist()
        made.append(Rendered(str(i), tuple(ids), (*[IGNORED] * (2 + i), *ids[2 + i :])))
    return made


def loss_and_gradients(model: Any, batches: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = sum(summed_loss(model, model, batch) for batch in batches)
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in lk.trainable(model).items() if p.grad is not None}


@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_loss_and_gradients_are_those_of_separate_documents(kind: str) -> None:
    model = build(kind, PACKABLE[kind])
    lk.attach(model, lk.LoRA(r=4), seed=0)
    with torch.no_grad():
        for name, parameter in lk.trainable(model).items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05)
    assert packing_error(model) is None
    collate = PackedCollator()
    together, grouped = loss_and_gradients(model, [collate(rows())])
    apart, separate = loss_and_gradients(model, [collate([row]) for row in rows()])
    padded, side_by_side = loss_and_gradients(model, [PaddedCollator(0)(rows())])
    assert together == pytest.approx(apart, rel=1e-6)
    assert padded == pytest.approx(apart, rel=1e-6)
    assert grouped.keys() == separate.keys() == side_by_side.keys()
    for name, gradient in separate.items():
        scale = gradient.abs().max().item() + 1e-12
        assert (grouped[name] - gradient).abs().max().item() <= 1e-4 * scale, name
        assert (side_by_side[name] - gradient).abs().max().item() <= 1e-4 * scale, name


def test_packed_logits_are_bit_equal_in_the_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    module = torch.nn.Identity()

    def attend(start: int, end: int, borders: list[int]) -> torch.Tensor:
        part = (t[:, :, start:end] for t in (q, k, v))
        return packed_attention(module, *part, None, cu_seq_lens_q=torch.tensor(borders))[0]

    whole = attend(0, 12, [0, 5, 7, 12])
    pieces = [attend(a, b, [0, b - a]) for a, b in ((0, 5), (5, 7), (7, 12))]
    assert torch.equal(whole, torch.cat(pieces, dim=1))


def test_a_window_is_kept_inside_a_document() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    out = packed_attention(
        torch.nn.Identity(), q, k, v, None, sliding_window=2, cu_seq_lens_q=torch.tensor([0, 6])
    )[0]
    scores = (q @ k.mT) / 2.0
    back = torch.arange(6)[:, None] - torch.arange(6)
    expected = scores.masked_fill((back < 0) | (back >= 2), -torch.inf).softmax(-1) @ v
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("kind", NOT_PACKABLE)
def test_models_that_cannot_be_packed_are_named(kind: str) -> None:
    model = build(kind, NOT_PACKABLE[kind])
    reason = packing_error(model)
    assert reason is not None
    assert type(model).__name__ in reason


def test_attention_is_put_back_also_after_an_error() -> None:
    model = tiny_model()
    before = model.config._attn_implementation
    with packed(model):
        assert model.config._attn_implementation == "lorakit_packed"
    assert model.config._attn_implementation == before
    with pytest.raises(ZeroDivisionError), packed(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before


def test_a_batch_that_is_not_packed_is_refused_inside() -> None:
    model = tiny_model()
    with packed(model), pytest.raises(ValueError, match="not packed"):
        model(input_ids=torch.tensor([[5, 6, 7]]))


def test_pack_restarts_positions() -> None:
    batch = pack([[7, 8, 9], [5, 6]])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]


def test_learnt_tokens_are_counted_without_the_first_of_a_document() -> None:
    batch = PackedCollator()(rows(3))
    assert count_learnt(batch) == sum(row.learnt for row in rows(3))
