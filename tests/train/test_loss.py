"""The loss equals the cross-entropy of all logits, written out."""

from __future__ import annotations

import pytest
import torch

import lorakit as lk
from lorakit.train.collate import PackedCollator, PaddedCollator
from lorakit.train.head_loss import separable_head
from lorakit.train.loss import count_learnt, next_token_labels, summed_loss, token_losses
from lorakit.train.render import IGNORED, Rendered
from tests.tiny_chat import tiny_model

ROWS = [
    Rendered("a", (5, 6, 7, 9, 11), (IGNORED, IGNORED, 7, 9, 11)),
    Rendered("b", (8, 2, 4), (IGNORED, IGNORED, 4)),
    Rendered("c", (30, 31, 32, 33), (IGNORED, 31, IGNORED, 33)),
]


def expected(model: torch.nn.Module) -> torch.Tensor:
    total = torch.zeros(())
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for position, label in enumerate(row.labels):
            if label != IGNORED:
                total = total - logits[position - 1, label]
    return total


@pytest.mark.parametrize("collator", [PackedCollator(), PaddedCollator(2)])
def test_sum_and_gradient(collator: PackedCollator | PaddedCollator) -> None:
    model = tiny_model()
    lk.attach(model, lk.LoRA(r=2), seed=0)
    batch = collator(ROWS)
    assert count_learnt(batch) == 6
    loss, right = summed_loss(model, model, batch), expected(model)
    assert loss.item() == pytest.approx(right.item(), rel=1e-6)
    parameters = list(lk.trainable(model).values())
    for got, want in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(right, parameters), strict=True
    ):
        assert torch.allclose(got, want, atol=1e-5, rtol=1e-4)


def test_logits_are_made_at_needed_positions_only() -> None:
    model = tiny_model()
    assert separable_head(model) is model.lm_head
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))
    summed_loss(model, model, PackedCollator()(ROWS))
    token_losses(model, model, PackedCollator()(ROWS))
    assert sizes == [6, 6]


def test_a_model_that_cannot_choose_positions_gives_the_same() -> None:
    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()

        def modules(self):  # type: ignore[no-untyped-def]
            return self.inner.modules()

        def forward(self, input_ids, attention_mask=None, use_cache=None):  # type: ignore[no-untyped-def]
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model = Whole()
    loss = summed_loss(model, model, PaddedCollator(2)(ROWS))  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(expected(model.inner).item(), rel=1e-6)


def test_labels_move_one_to_the_left() -> None:
    assert next_token_labels(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, IGNORED]]
