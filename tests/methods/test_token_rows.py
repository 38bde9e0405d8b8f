"""Token rows: only what belongs to the named tokens changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.errors import ConfigError, UnsupportedTargetError
from tests.contracts.kinds import Host
from tests.contracts.pairs import close


class Tied(nn.Module):
    """An embedding whose table is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


@pytest.mark.parametrize(
    "ids",
    [(), (-1,), (1, 1), (1.5,), ("a",), 3, "12"],
    ids=["none", "negative", "twice", "fraction", "word", "number", "text"],
)
def test_ids_are_different_whole_numbers(ids: Any) -> None:
    with pytest.raises(ConfigError, match="token ids"):
        lk.TokenRows(ids=ids)


def test_ids_of_any_integer_type() -> None:
    assert lk.TokenRows(ids=[torch.tensor(3), 1]).ids == (3, 1)  # type: ignore[arg-type]


def test_an_id_outside_the_table_is_refused() -> None:
    with pytest.raises(UnsupportedTargetError, match="token id 9 is outside its table of 9 rows"):
        lk.attach(Host(nn.Embedding(9, 4)), lk.TokenRows(ids=(1, 9)), ["layer"])


def test_only_the_named_tokens_change() -> None:
    torch.manual_seed(0)
    model = Host(nn.Embedding(9, 4))
    x = torch.arange(9)
    base = model(x).detach()
    report = lk.attach(model, lk.TokenRows(ids=(7, 2)), ["layer"])
    assert report.parameters == 2 * 4
    (rows,) = lk.trainable(model).values()
    with torch.no_grad():
        rows.copy_(torch.tensor([[7.0] * 4, [2.0] * 4]))
    y = model(x)
    assert (y[7] == 7).all()
    assert (y[2] == 2).all()
    others = [0, 1, 3, 4, 5, 6, 8]
    assert torch.equal(y[others], base[others])


def test_the_tied_head_follows() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    x = torch.tensor([[1, 5, 3]])
    base = model(x).detach()
    lk.attach(model, lk.TokenRows(ids=(5, 2)), ["embed"], name="a", dtype=torch.float64)
    (rows,) = lk.trainable(model).values()
    close(model(x), base, 1e-14)
    with torch.no_grad():
        rows.normal_()
    table = model.embed.weight.detach().clone()
    table[5], table[2] = rows[0], rows[1]
    expected = torch.tanh(table[x]) @ table.T
    close(model(x), expected, 1e-13)
    G = torch.randn_like(expected)
    (got,) = torch.autograd.grad((model(x) * G).sum(), rows)
    dense = rows.detach().clone().requires_grad_()
    table = model.embed.weight.detach().index_copy(0, torch.tensor([5, 2]), dense)
    (want,) = torch.autograd.grad((torch.tanh(table[x]) @ table.T * G).sum(), dense)
    close(got, want, 1e-13)
    with lk.use(model, None):
        assert torch.equal(model(x), base)
    lk.detach(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(x), base)


def test_no_full_table_is_made() -> None:
    model = Host(nn.Embedding(5000, 8))
    lk.attach(model, lk.TokenRows(ids=(3,)), ["layer"])
    largest = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.tensor([[3, 4]])).sum().backward()
    assert largest < 5000
