"""Token rows on whole models: the rows act in the embedding and, where it is tied, in the head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.errors import UnsupportedTargetError
from tests.attach.small_models import TiedLm, fill, picture, with_adapters

TOKENS = (1, 4, 10)
IDS = torch.tensor([[0, 1, 2], [4, 4, 5], [9, 10, 3], [6, 7, 8]])


def by_hand(model: nn.Module, name: str) -> torch.Tensor:
    """What a plain model computes whose rows were replaced."""
    head_is_tied = model.head.weight is model.embed.weight
    plain = TiedLm(tied=head_is_tied, padding_idx=model.embed.padding_idx)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lorakit" not in k})
    with torch.no_grad():
        plain.embed.weight[list(TOKENS)] = model.embed.lorakit.output._modules[name].rows
    return plain(IDS)


@pytest.mark.parametrize("padding", [None, 1], ids=["no padding", "padding among the rows"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_rows_are_replaced_where_the_table_is_used(tied: bool, padding: int | None) -> None:
    model = TiedLm(tied=tied, padding_idx=padding)
    before, base = picture(model), model(IDS)
    lk.attach(model, lk.TokenRows(TOKENS), ["embed"])
    torch.testing.assert_close(model(IDS), base, atol=1e-6, rtol=1e-6)
    fill(model, std=1.0)
    want = by_hand(model, "default")
    assert (want - base).abs().max() > 0.1
    torch.testing.assert_close(model(IDS), want)
    lk.merge(model)
    torch.testing.assert_close(model(IDS), want)
    lk.unmerge(model)
    lk.detach(model)
    assert picture(model) == before


def test_only_the_rows_are_trained_also_through_the_tied_head() -> None:
    model = TiedLm()
    lk.attach(model, lk.TokenRows(TOKENS), ["embed"])
    assert [tuple(p.shape) for p in lk.trainable(model).values()] == [
        (3, 6)
    ]  # shared by the head, and counted once
    ids = torch.tensor([[0, 2]])  # none of the tokens is looked up: the gradient comes through the head alone
    model(ids)[..., 4].sum().backward()
    (rows,) = lk.trainable(model).values()
    assert rows.grad is not None
    assert rows.grad[1].abs().sum() > 0
    assert rows.grad[[0, 2]].abs().sum() == 0


def test_rows_of_a_batch_and_mixes() -> None:
    model = with_adapters(TiedLm(), "a", "b", method=lk.TokenRows(TOKENS), targets=["embed"])
    each = []
    routes = ["a", None, "b", {"a": 0.5, "b": 0.25}]
    for i, row in enumerate(routes):
        with torch.no_grad(), lk.use(model, row):
            each.append(model(IDS[i : i + 1]))
    with torch.no_grad(), lk.use(model, rows=routes):
        torch.testing.assert_close(model(IDS), torch.cat(each))
    with lk.use(model, {"a": 0.5, "b": 0.25}):
        mixed = model(IDS)
    lk.merge(model, {"a": 0.5, "b": 0.25})
    torch.testing.assert_close(model(IDS), mixed)


def test_beside_lora_on_the_layers() -> None:
    model = TiedLm()
    lk.attach(model, {"embed": lk.TokenRows(TOKENS), "body": lk.LoRA(r=2)})
    fill(model)
    unmerged = model(IDS)
    lk.merge(model, permanent=True)
    torch.testing.assert_close(model(IDS), unmerged)


def test_a_state_goes_to_another_model_with_its_tie() -> None:
    model = with_adapters(TiedLm(), "a", method=lk.TokenRows(TOKENS), targets=["embed"])
    other = TiedLm()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lorakit" not in k})
    lk.attach(other, lk.extract(model, "a"))
    assert torch.equal(other(IDS), model(IDS))


def test_tokens_outside_the_table_are_refused() -> None:
    with pytest.raises(UnsupportedTargetError, match="token id 11 is outside its table of 11 rows"):
        lk.attach(TiedLm(), lk.TokenRows((0, 11)), ["embed"])


def test_a_tie_that_cannot_be_followed_is_refused() -> None:
    class Bare(TiedLm):
        """Reads the table under a second name, with no layer to adapt."""

        def __init__(self) -> None:
            super().__init__(tied=False)
            self.table = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.embed(ids) @ self.table.T

    model = Bare()
    before = picture(model)
    with pytest.raises(UnsupportedTargetError, match=r"must also act at 'table', which uses the same weight"):
        lk.attach(model, lk.TokenRows((1,)), ["embed"])
    assert picture(model) == before
